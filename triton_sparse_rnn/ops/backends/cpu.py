"""The recurrent layer on the CPU by numba vector code: the twin of `reference.recurrent_layer` for what it supports."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_sparse_rnn.kernels.cpu import support
from triton_sparse_rnn.ops.layer_weights import MATRICES, LayerWeights, RunLayer, StoredLayer, plain


def availability() -> str | None:
    """Return why no kernel for the CPU can run in this process, or None where one can."""
    return support.availability()


def unsupported_reason(layer: StoredLayer) -> str | None:
    """Why the kernels cannot run this layer; None if they can."""
    if layer.device.type != "cpu":
        return f"it needs tensors on the CPU, these are on {layer.device}"
    if layer.dtype == torch.float64:
        return "it computes in float32, the layer's dtype is torch.float64"
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


def _float(weight: Any) -> Any:
    """Return a tensor in float32; blocks, which are widened as they are read, and None as they are."""
    return weight.float() if isinstance(weight, Tensor) else weight
