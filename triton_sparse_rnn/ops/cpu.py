"""The recurrent layer on the CPU by numba vector code: the twin of `reference.recurrent_layer` for what it supports."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_sparse_rnn.ops.layer_weights import LayerWeights


def unsupported_reason(
    mode: str, dtype: torch.dtype, device: torch.device, directions: list[LayerWeights]
) -> str | None:
    """Why the kernels cannot run this layer; None if they can."""
    if device.type != "cpu":
        return f"it needs tensors on the CPU, these are on {device}"
    if mode != "GRU":
        return f"it runs GRU only in this version, this is {mode}"
    if dtype != torch.float32:
        return f"it computes in float32 only, the layer's dtype is {dtype}"
    from triton_sparse_rnn.kernels.cpu import support

    reasons = (support.unsupported_reason(weights.weight_ih, weights.weight_hh) for weights in directions)
    return next(filter(None, reasons), None)


def recurrent_layer(
    x: Tensor, states: list[Tensor], directions: list[LayerWeights], batch_sizes: Tensor | None, mode: str
) -> list[Tensor]:
    """Arguments and results are those of `reference.recurrent_layer`."""
    from triton_sparse_rnn.kernels.cpu.gru import gru_layer

    assert mode == "GRU", mode
    x, h0 = x.resolve_neg().contiguous(), states[0].resolve_neg().contiguous()  # as they lie in memory
    batch_sizes = None if batch_sizes is None else batch_sizes.contiguous()
    D, _, H = h0.shape
    y, h_n = x.new_empty(x.shape[0], D * H), torch.empty_like(h0)
    for direction, (weight_ih, weight_hh, bias_ih, bias_hh, _) in enumerate(directions):
        gru_layer(x, h0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, direction=direction, y=y, h_n=h_n)
    return [y, h_n]
