"""How near the recurrence is to the limit: the time in which this core reads the stored values and indices once a step.

The input projection is computed before the clock starts. The ratio of a recurrence is its share of the limit, by the
fastest round of both: a limit is what the machine can do while nothing else runs on it.
"""

from __future__ import annotations

import numpy as np
import pytest
from numba import njit

from bench.budgets import assert_within_budget
from bench.cpu.recurrence import recurrence, stored
from bench.workloads import Workload
from triton_sparse_rnn.sparse.patterns import Blocks
from triton_sparse_rnn.sparse.picks import Picks

WORKLOADS = [
    Workload(cell=cell, H=H, T=100, sparsity=0.9, pattern=pattern)
    for cell, sizes in (("GRU", (256, 512, 1024, 2048)), ("LSTM", (512, 1024)), ("RNN_TANH", (512, 1024)))
    for H in sizes
    for pattern in (Blocks(16, 1), Blocks(16, 4), Picks())
]


@pytest.mark.parametrize("contender", ["reading", "recurrence"])
@pytest.mark.parametrize("work", WORKLOADS, ids=str)
def bench_share_of_limit(benchmark, work: Workload, contender: str):
    matrix = stored(work, "weight_hh_l0")
    benchmark.group = f"{work}, recurrence"
    benchmark.extra_info.update(work.facts(), contender=contender, bytes_per_step=matrix.nbytes, statistic="min")
    if contender == "reading":
        numbers = np.ones(matrix.nbytes // 4, np.float32)
        assert _read(numbers, 1) == len(numbers)
        benchmark(_read, numbers, work.T)
    else:
        run = recurrence(work, matrix)
        benchmark.extra_info["max_error"] = assert_within_budget(run(), work, "float32").largest
        benchmark(run)


@njit(nogil=True, fastmath=True)
def _read(numbers, times):
    total = np.float32(0)
    for _ in range(times):
        for i in range(numbers.size):  # LLVM makes vectors of this, and not of a loop over the array itself
            total += numbers[i]
    return total
