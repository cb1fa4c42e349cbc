"""The parts of a layer by themselves: its recurrence, on an input projection that is known, and the projection."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.workloads import Workload
from triton_sparse_rnn.kernels.cpu.recurrent_layer import RecurrentLayer
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.layer_config import GATES
from triton_sparse_rnn.sparse.layer_weights import LayerWeights
from triton_sparse_rnn.sparse.patterns import Pattern


def stored(work: Workload, name: str, dtype: torch.dtype = torch.float32) -> BlockMatrix:
    """Store a weight of a workload in its pattern."""
    return BlockMatrix.from_dense(work.layer.get_parameter(name), work.pattern, gates=GATES[work.cell], dtype=dtype)


def recurrence(work: Workload, matrix: BlockMatrix, *, quantized: bool = False) -> Callable[[], Tensor]:
    """Return a call that runs all steps on a projection that is there already, and returns y [T, B, H].

    Args:
        work: its recurrent weight is `matrix`.
        quantized: whether h is, for weights in int8.
    """
    weight_ih, bias_ih = map(work.layer.get_parameter, ("weight_ih_l0", "bias_ih_l0"))
    projected = torch.nn.functional.linear(work.x.flatten(0, 1), weight_ih, bias_ih).flatten()
    projected = torch.cat([projected, torch.zeros(matrix.block_size[0])])
    return _call(work, weight_ih, matrix, quantized, [projected])


def whole_layer(
    work: Workload, weight_ih: BlockMatrix, weight_hh: BlockMatrix, *, quantized: bool = False
) -> Callable[[], Tensor]:
    """Return a call that runs all steps, projection and recurrence, and returns y [T, B, H]."""
    return _call(work, weight_ih, weight_hh, quantized, None)


def projection(work: Workload, weight_ih: BlockMatrix, *, quantized: bool = False) -> Callable[[], Tensor]:
    """Return a call that runs W_ih x and the gates of all steps, in a layer without weights of h."""
    return whole_layer(
        work, weight_ih, _no_weights(work, weight_ih.pattern, weight_ih.values.dtype), quantized=quantized
    )


def gates_alone(work: Workload) -> Callable[[], Tensor]:
    """Return a call that runs the gates of all steps."""
    return recurrence(work, _no_weights(work, work.pattern, torch.float32))


def _no_weights(work: Workload, pattern: Pattern, dtype: torch.dtype) -> BlockMatrix:
    zeros = torch.zeros_like(work.layer.get_parameter("weight_hh_l0"))
    return BlockMatrix.from_dense(zeros, pattern, gates=GATES[work.cell], dtype=dtype)


def _call(
    work: Workload,
    weight_ih: BlockMatrix | Tensor,
    weight_hh: BlockMatrix,
    quantized: bool,
    projected: Sequence[Tensor] | None,
) -> Callable[[], Tensor]:
    bias_ih, bias_hh = map(work.layer.get_parameter, ("bias_ih_l0", "bias_hh_l0"))
    layer = RecurrentLayer(work.cell, [LayerWeights(weight_ih, weight_hh, bias_ih, bias_hh)], quantized=quantized)
    x = work.x.flatten(0, 1)
    states = [torch.zeros(1, work.B, work.H)] * (2 if work.cell == "LSTM" else 1)
    return lambda: layer(x, states, None, projected)[0].unflatten(0, (work.T, work.B))
