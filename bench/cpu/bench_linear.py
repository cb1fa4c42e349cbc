"""A linear layer on one thread, at the batches at which a stream and a service call it."""

import pytest
import torch

from bench.cpu.linear import LinearWork, OurLinear, TorchLinear, measure
from triton_sparse_rnn.sparse.picks import Picks

WORKLOADS = [
    LinearWork(size=size, B=B, sparsity=sparsity)
    for size in (512, 2048)
    for sparsity in (0.7, 0.8, 0.9, 0.95)
    for B in (1, 4, 16, 64)
]
CONTENDERS = [
    TorchLinear(),
    OurLinear(),
    OurLinear(Picks()),
    OurLinear(Picks(), weight_dtype=torch.int8),
    OurLinear(Picks(), weight_dtype=torch.int8, activation_dtype=torch.int8),
]


@pytest.mark.parametrize("contender", CONTENDERS, ids=str)
@pytest.mark.parametrize("work", WORKLOADS, ids=str)
def bench_linear(benchmark, work: LinearWork, contender: TorchLinear | OurLinear):
    measure(benchmark, work, contender)
