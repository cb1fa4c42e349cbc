"""The whole grid of GRU layers on a GPU, in parts: `python -m bench.gpu.grid DIR` runs those that DIR does not hold."""

import pytest
import torch

from bench.gpu.contenders import GpuContender, contenders_of, measure
from bench.workloads import Workload

pytestmark = pytest.mark.gpu

SIZES = (1024, 2560, 512, 2048, 256, 4096, 128)  # the most wanted first
DTYPES = (torch.bfloat16, torch.float32)
BATCHES = (1, 4, 16, 64)
SPARSITIES = (0.8, 0.9, 0.95)

# By name, which `pytest -k` finds in the names of its rows: H256_ is not in H2560_.
PARTS = {
    f"H{H}_{str(dtype).removeprefix('torch.')}": [
        Workload(H=H, T=256, B=B, sparsity=sparsity, dtype=dtype, device="cuda")
        for B in BATCHES
        for sparsity in SPARSITIES
    ]
    for H in SIZES
    for dtype in DTYPES
}
ROWS = [
    pytest.param(work, contender, id=f"{part}-{work}-{contender}")
    for part, works in PARTS.items()
    for work in works
    for contender in contenders_of(work)
]


@pytest.mark.parametrize(("work", "contender"), ROWS)
def bench_grid(benchmark, work: Workload, contender: GpuContender):
    measure(benchmark, work, contender)
