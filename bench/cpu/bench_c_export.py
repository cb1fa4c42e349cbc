"""A step of the C export beside the package's own kernel and step(): all three one step at a time, at batch 1.

A round is T steps. The goal is 1.2 times the kernel's time on AVX-512: a ratio to it of at least 0.83.
"""

import pytest
import torch

from bench.budgets import assert_within_budget
from bench.cpu.c_step import CONTENDERS, precision, ready
from bench.workloads import Workload
from triton_sparse_rnn.sparse.picks import Picks

T = 100
WORKLOADS = [
    Workload(cell=cell, H=H, T=T, sparsity=0.9, pattern=pattern, masks="balanced" if pattern.balanced else "random")
    for cell in ("GRU", "LSTM")
    for H in (256, 512, 1024)
    for pattern in (Workload.pattern, Picks())
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("label", CONTENDERS)
@pytest.mark.parametrize("work", WORKLOADS, ids=str)
def bench_steps(benchmark, work: Workload, label: str, dtype: torch.dtype):
    run = ready(label, work, dtype)
    with torch.inference_mode():
        error = assert_within_budget(run(), work, precision(dtype))
        benchmark.group = f"{work}, {precision(dtype)}"
        facts = {"contender": label, "precision": precision(dtype), "max_error": error.largest}
        benchmark.extra_info.update(work.facts(), **facts)
        benchmark(run)
