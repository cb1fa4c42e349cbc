"""The first look: three GRU layers in float32, in blocks and in picks, beside cuDNN, in well under a minute.

`bash bench/gpu_check.sh --smoke DIR` runs it.
"""

import pytest
import torch

from bench.gpu.contenders import CuDNN, GpuContender, Ours, measure
from bench.workloads import Workload
from triton_sparse_rnn.sparse.patterns import Blocks
from triton_sparse_rnn.sparse.picks import Picks

pytestmark = pytest.mark.gpu

# The most wanted first: what begins too late is left out.
SMOKE = [
    Workload(H=H, sparsity=0.9, T=256, dtype=torch.float32, device="cuda").pruned_in(pattern)
    for pattern in (Blocks(16, 1), Picks())
    for H in (1024, 512, 2560)
]
CONTENDERS: list[GpuContender] = [CuDNN(), CuDNN(graph=True), Ours(), Ours(graph=True)]


@pytest.mark.parametrize("contender", CONTENDERS, ids=str)
@pytest.mark.parametrize("work", SMOKE, ids=str)
def bench_smoke(benchmark, work: Workload, contender: GpuContender):
    measure(benchmark, work, contender)
