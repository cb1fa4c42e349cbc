"""The whole grid of GRU layers on a GPU. `bash bench/gpu_check.sh --full DIR` measures as many as fit, and goes on."""

import pytest
import torch

from bench.gpu.contenders import GpuContender, contenders_of, measure
from bench.workloads import Workload

pytestmark = pytest.mark.gpu

SIZES = (1024, 2560, 512, 2048, 256, 4096, 128)  # the most wanted first
DTYPES = (torch.bfloat16, torch.float32)
BATCHES = (1, 4, 16, 64)
SPARSITIES = (0.8, 0.9, 0.95)

GRID = [
    Workload(H=H, T=256, B=B, sparsity=sparsity, dtype=dtype, device="cuda")
    for H in SIZES
    for dtype in DTYPES
    for B in BATCHES
    for sparsity in SPARSITIES
]
ROWS = [(work, contender) for work in GRID for contender in contenders_of(work)]


@pytest.mark.parametrize(("work", "contender"), ROWS, ids=str)
def bench_grid(benchmark, work: Workload, contender: GpuContender):
    measure(benchmark, work, contender)
