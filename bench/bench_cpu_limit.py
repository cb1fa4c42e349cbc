"""How near the recurrence is to the limit: the time in which this core reads the stored values and indices once a step.

The input projection is computed before the clock starts. The ratio of a recurrence is its share of the limit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numba import njit
from torch import Tensor

from bench.budgets import assert_within_budget
from bench.workloads import GATES, Workload
from triton_sparse_rnn.kernels.cpu.recurrent_layer import Direction, RecurrentLayer
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix

WORKLOADS = [
    Workload(cell=cell, H=H, T=100, sparsity=0.9, block_size=block_size)
    for cell, sizes in (("GRU", (256, 512, 1024, 2048)), ("LSTM", (512, 1024)), ("RNN_TANH", (512, 1024)))
    for H in sizes
    for block_size in ((16, 1), (16, 4))
]


@pytest.mark.parametrize("work", WORKLOADS, ids=str)
def bench_reading(benchmark, work: Workload):
    matrix = _recurrent_matrix(work)
    numbers = np.ones(matrix.nbytes // 4, np.float32)
    assert _read(numbers, 1) == len(numbers)
    _describe(benchmark, work, "reading", matrix)
    benchmark(_read, numbers, work.T)


@pytest.mark.parametrize("work", WORKLOADS, ids=str)
def bench_recurrence(benchmark, work: Workload):
    matrix = _recurrent_matrix(work)
    run = _recurrence(work, matrix)
    error = assert_within_budget(run().unsqueeze(1), work, "float32")
    _describe(benchmark, work, "recurrence", matrix)
    benchmark.extra_info["max_error"] = error.largest
    benchmark(run)


@njit(nogil=True, fastmath=True)
def _read(numbers, times):
    total = np.float32(0)
    for _ in range(times):
        for i in range(numbers.size):  # LLVM makes vectors of this, and not of a loop over the array itself
            total += numbers[i]
    return total


def _recurrent_matrix(work: Workload) -> BlockMatrix:
    return BlockMatrix.from_dense(work.layer.weight_hh_l0, work.block_size, gates=GATES[work.cell])


def _recurrence(work: Workload, matrix: BlockMatrix) -> Callable[[], Tensor]:
    """Return a call that runs all steps on a projection that is there already, and returns y [T, H]."""
    weights = work.layer
    direction = Direction(weights.weight_ih_l0, matrix, weights.bias_ih_l0, weights.bias_hh_l0, None)
    layer = RecurrentLayer(work.cell, [direction], quantized=False)
    x, states = work.x[:, 0], [torch.zeros(1, 1, work.H)] * (2 if work.cell == "LSTM" else 1)
    projected = torch.nn.functional.linear(x, weights.weight_ih_l0, weights.bias_ih_l0).flatten()
    projected = torch.cat([projected, torch.zeros(matrix.block_size[0])])
    return lambda: layer.run(x, [projected], states, None)[0]


def _describe(benchmark, work: Workload, contender: str, matrix: BlockMatrix) -> None:
    benchmark.group = f"{work}, recurrence"
    benchmark.extra_info.update(work.facts(), contender=contender, bytes_per_step=matrix.nbytes)
