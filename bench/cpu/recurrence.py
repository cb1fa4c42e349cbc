"""The recurrence of a layer by itself: its input projection is computed before the clock starts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.workloads import Workload
from triton_sparse_rnn.kernels.cpu.recurrent_layer import RecurrentLayer
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.layer_config import GATES
from triton_sparse_rnn.sparse.layer_weights import LayerWeights


def recurrent_matrix(work: Workload, dtype: torch.dtype = torch.float32) -> BlockMatrix:
    """Store the recurrent weight of a workload in its pattern."""
    weight = work.layer.get_parameter("weight_hh_l0")
    return BlockMatrix.from_dense(weight, work.pattern, gates=GATES[work.cell], dtype=dtype)


def recurrence(work: Workload, matrix: BlockMatrix, *, quantized: bool = False) -> Callable[[], Tensor]:
    """Return a call that runs all steps on a projection that is there already, and returns y [T, B, H].

    Args:
        work: its recurrent weight is `matrix`.
        quantized: whether h is, for weights in int8.
    """
    weight_ih, bias_ih, bias_hh = map(work.layer.get_parameter, ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0"))
    layer = RecurrentLayer(work.cell, [LayerWeights(weight_ih, matrix, bias_ih, bias_hh)], quantized=quantized)
    x = work.x.flatten(0, 1)
    states = [torch.zeros(1, work.B, work.H)] * (2 if work.cell == "LSTM" else 1)
    projected = torch.nn.functional.linear(x, weight_ih, bias_ih).flatten()
    projected = torch.cat([projected, torch.zeros(matrix.block_size[0])])
    return lambda: layer(x, states, None, [projected])[0].unflatten(0, (work.T, work.B))
