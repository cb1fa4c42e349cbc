"""How near the recurrence is to the limit: the time in which this core reads the stored values and indices once a step.

The input projection is computed before the clock starts. The ratio of a recurrence is its share of the limit, by the
fastest round of both: a limit is what the machine can do while nothing else runs on it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numba import njit
from torch import Tensor

from bench.budgets import assert_within_budget
from bench.workloads import Workload
from triton_sparse_rnn.kernels.cpu.recurrent_layer import RecurrentLayer
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.layer_config import GATES
from triton_sparse_rnn.sparse.layer_weights import LayerWeights

WORKLOADS = [
    Workload(cell=cell, H=H, T=100, sparsity=0.9, block_size=block_size)
    for cell, sizes in (("GRU", (256, 512, 1024, 2048)), ("LSTM", (512, 1024)), ("RNN_TANH", (512, 1024)))
    for H in sizes
    for block_size in ((16, 1), (16, 4))
]


@pytest.mark.parametrize("contender", ["reading", "recurrence"])
@pytest.mark.parametrize("work", WORKLOADS, ids=str)
def bench_share_of_limit(benchmark, work: Workload, contender: str):
    matrix = _recurrent_matrix(work)
    benchmark.group = f"{work}, recurrence"
    benchmark.extra_info.update(work.facts(), contender=contender, bytes_per_step=matrix.nbytes, statistic="min")
    if contender == "reading":
        numbers = np.ones(matrix.nbytes // 4, np.float32)
        assert _read(numbers, 1) == len(numbers)
        benchmark(_read, numbers, work.T)
    else:
        run = _recurrence(work, matrix)
        benchmark.extra_info["max_error"] = assert_within_budget(run().unsqueeze(1), work, "float32").largest
        benchmark(run)


@njit(nogil=True, fastmath=True)
def _read(numbers, times):
    total = np.float32(0)
    for _ in range(times):
        for i in range(numbers.size):  # LLVM makes vectors of this, and not of a loop over the array itself
            total += numbers[i]
    return total


def _recurrent_matrix(work: Workload) -> BlockMatrix:
    return BlockMatrix.from_dense(work.layer.get_parameter("weight_hh_l0"), work.block_size, gates=GATES[work.cell])


def _recurrence(work: Workload, matrix: BlockMatrix) -> Callable[[], Tensor]:
    """Return a call that runs all steps on a projection that is there already, and returns y [T, H]."""
    names = ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0")
    weight_ih, bias_ih, bias_hh = map(work.layer.get_parameter, names)
    direction = LayerWeights(weight_ih, matrix, bias_ih, bias_hh)
    layer = RecurrentLayer(work.cell, [direction], quantized=False)
    x, states = work.x[:, 0], [torch.zeros(1, 1, work.H)] * (2 if work.cell == "LSTM" else 1)
    projected = torch.nn.functional.linear(x, weight_ih, bias_ih).flatten()
    projected = torch.cat([projected, torch.zeros(matrix.block_size[0])])
    return lambda: layer(x, states, None, [projected])[0]
