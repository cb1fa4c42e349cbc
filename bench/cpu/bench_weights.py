"""What narrow weights gain, and what they cost in exactness: GRU at batch 1, 90 % zeros, one thread."""

import pytest
import torch

from bench.contenders import Contender, Dense, Ours, measure
from bench.workloads import Workload
from triton_sparse_rnn.sparse.patterns import Blocks
from triton_sparse_rnn.sparse.picks import Picks

CONTENDERS = [
    Dense(),
    *(Ours(weight_dtype=dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8)),
    Ours(weight_dtype=torch.int8, activation_dtype=torch.int8),
]
WORKLOADS = [
    Workload(H=H, T=T, sparsity=0.9, pattern=pattern)
    for H, T in ((512, 100), (1024, 100), (2048, 50))
    for pattern in (Blocks(16, 1), Blocks(16, 4), Picks(), Picks(16, 64, 4))
]


@pytest.mark.parametrize("contender", CONTENDERS, ids=str)
@pytest.mark.parametrize("work", WORKLOADS, ids=str)
def bench_weights(benchmark, work: Workload, contender: Contender):
    measure(benchmark, work, contender)
