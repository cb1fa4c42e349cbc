"""Ours beside what users would pick instead: whole sequences at batch 1, 90 % zeros, one thread."""

import pytest
import torch

from bench.contenders import Contender, Dense, Ours, measure
from bench.cpu.peers import PEERS
from bench.workloads import Workload

CONTENDERS = (Dense(), *PEERS, Ours(), Ours(weight_dtype=torch.int8, activation_dtype=torch.int8))
WORKLOADS = [
    *(Workload(H=H, T=T, sparsity=0.9) for H, T in ((256, 100), (512, 100), (1024, 100), (2048, 50))),
    Workload(cell="LSTM", H=512, sparsity=0.9),
]


@pytest.mark.parametrize("contender", CONTENDERS, ids=str)
@pytest.mark.parametrize("work", WORKLOADS, ids=str)
def bench_peers(benchmark, work: Workload, contender: Contender):
    measure(benchmark, work, contender)
