"""Recurrent and linear layers on the CPU by numba vector code: twins of those of reference.py for what they support."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_sparse_rnn.kernels.cpu import support
from triton_sparse_rnn.ops.layer_weights import MATRICES, LayerWeights, RunLayer, StoredLayer, plain
from triton_sparse_rnn.ops.stored_linear import RunLinear, StoredLinear


def availability() -> str | None:
    """Return why no kernel for the CPU can run in this process, or None where one can."""
    return support.availability()


def unsupported_reason(layer: StoredLayer) -> str | None:
    """Why the kernels cannot run this layer; None if they can."""
    if (reason := _unsupported_place(layer)) is not None:
        return reason
    weights = ((name, getattr(direction, name)) for direction in layer.directions for name in MATRICES)
    quantized = layer.activation_dtype is not None
    reasons = (support.unreadable_reason(*weight, quantized=quantized) for weight in weights if weight[1] is not None)
    return next(filter(None, reasons), None)


def prepare_layer(layer: StoredLayer, num_threads: int) -> RunLayer:
    """Arguments and results of the callable are those of `reference.recurrent_layer`."""
    from triton_sparse_rnn.kernels.cpu.recurrent_layer import RecurrentLayer  # loads numba

    def make() -> RecurrentLayer:
        wide = [LayerWeights(*map(_float, weights)) for weights in layer.directions]
        return RecurrentLayer(layer.mode, wide, quantized=layer.activation_dtype is not None, num_threads=num_threads)

    prepared = make()

    def run(x: Tensor, states: list[Tensor], batch_sizes: Tensor | None) -> list[Tensor]:
        batch_sizes = None if batch_sizes is None else batch_sizes.contiguous()
        return prepared(plain(x), [plain(state) for state in states], batch_sizes)

    def run_wider(x: Tensor, states: list[Tensor], batch_sizes: Tensor | None) -> list[Tensor]:
        batch_sizes = None if batch_sizes is None else batch_sizes.contiguous()
        # Made again for what is cast in it: whatever was written into that since counts.
        results = make()(plain(x).float(), [plain(state).float() for state in states], batch_sizes)
        return [result.to(layer.dtype) for result in results]

    return run if layer.dtype == torch.float32 else run_wider


def unsupported_linear_reason(layer: StoredLinear) -> str | None:
    """Why the kernels cannot run this linear layer; None if they can."""
    quantized = layer.activation_dtype is not None
    return _unsupported_place(layer) or support.unreadable_reason("weight", layer.weight, quantized=quantized)


def prepare_linear(layer: StoredLinear, num_threads: int) -> RunLinear:
    """Argument and result of the callable are those of `reference.linear_layer`."""
    from triton_sparse_rnn.kernels.cpu.linear_layer import LinearLayer  # loads numba

    bias, quantized = layer.bias, layer.activation_dtype is not None
    wide_bias = _float(bias)
    prepared = LinearLayer(layer.weight, wide_bias, quantized=quantized, num_threads=num_threads)

    def run(x: Tensor) -> Tensor:
        return prepared(plain(x))

    def run_wider(x: Tensor) -> Tensor:
        if bias is not None:
            wide_bias.copy_(bias)  # whatever was written into it since counts
        return prepared(plain(x).float()).to(layer.dtype)

    return run if layer.dtype == torch.float32 else run_wider


def _unsupported_place(layer: StoredLayer | StoredLinear) -> str | None:
    if layer.device.type != "cpu":
        return f"it needs tensors on the CPU, these are on {layer.device}"
    if layer.dtype == torch.float64:
        return "it computes in float32, the layer's dtype is torch.float64"
    return None


def _float(weight: Any) -> Any:
    """Return a tensor in float32; blocks, which are widened as they are read, and None as they are."""
    return weight.float() if isinstance(weight, Tensor) else weight
