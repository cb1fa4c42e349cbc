"""The core of the GPU benchmarks: the layers of the goals, and the ones where ours has the least to gain.

`bash bench/gpu_check.sh DIR` runs it; `python -m bench.report FILE --gpu` makes its table.
"""

import pytest
import torch

from bench.gpu.contenders import GpuContender, contenders_of, measure
from bench.workloads import Workload
from triton_sparse_rnn.sparse.patterns import Blocks
from triton_sparse_rnn.sparse.picks import Picks

pytestmark = pytest.mark.gpu

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def gpu_workload(H: int, sparsity: float = 0.9, **options) -> Workload:
    return Workload(**{"H": H, "sparsity": sparsity, "T": 1000, "device": "cuda", **options})


# The most wanted first: what begins too late is left out.
CORE = [
    *(gpu_workload(H, dtype=dtype) for H in (1024, 2560) for dtype in (F32, BF16)),
    *(gpu_workload(H, dtype=dtype).pruned_in(Picks()) for H in (1024, 2560) for dtype in (F32, BF16)),
    *(gpu_workload(2560, 0.95, dtype=dtype) for dtype in (F32, BF16)),
    *(gpu_workload(H, dtype=dtype) for H in (256, 512) for dtype in (F32, BF16)),
    *(gpu_workload(1024, B=16, dtype=dtype) for dtype in (F32, BF16)),
    gpu_workload(2560, B=16, dtype=BF16),
    gpu_workload(512, dtype=F32).pruned_in(Picks()),
    gpu_workload(1024, B=16, dtype=BF16).pruned_in(Picks()),
    gpu_workload(1024, cell="LSTM", dtype=F32).pruned_in(Picks()),
    gpu_workload(1024, cell="LSTM", dtype=F32),
    gpu_workload(1024, cell="LSTM", dtype=BF16),
    gpu_workload(1024, cell="RNN_TANH", dtype=F32),
    gpu_workload(128, dtype=F32),  # here cuDNN keeps the weights on the chip too
    gpu_workload(512, cell="LSTM", B=8, dtype=F16),  # and here
    gpu_workload(1024, T=1, dtype=F32),  # a step of a stream
    *(gpu_workload(1024, pattern=Blocks(16, 16), T=100, dtype=dtype) for dtype in (F32, BF16)),  # torch BSR takes these
    *(gpu_workload(2560, masks=masks, dtype=F32) for masks in ("balanced", "tied")),
    gpu_workload(4096, dtype=BF16),
    gpu_workload(1024, B=4, dtype=F32),
    gpu_workload(1024, B=64, dtype=BF16),
    gpu_workload(1024, 0.8, dtype=BF16),
]
ROWS = [(work, contender) for work in CORE for contender in contenders_of(work)]


@pytest.mark.parametrize(("work", "contender"), ROWS, ids=str)
def bench_core(benchmark, work: Workload, contender: GpuContender):
    measure(benchmark, work, contender)
