"""Ours beside what users would take instead: whole sequences at batch 1, 90 % zeros, one thread."""

import dataclasses

import pytest
import torch

from bench.contenders import Contender, Dense, Ours, measure
from bench.cpu.peers import PEERS
from bench.workloads import Workload
from triton_sparse_rnn.sparse.patterns import Blocks
from triton_sparse_rnn.sparse.picks import Picks

IN_INT8 = Ours(weight_dtype=torch.int8, activation_dtype=torch.int8)
CONTENDERS = (
    Dense(),
    *PEERS,
    Ours(),
    Ours(pattern=Picks()),
    Ours(pattern=Blocks(1, 1), chooses=True),
    IN_INT8,
    dataclasses.replace(IN_INT8, pattern=Picks(16, 64, 4)),
)
WORKLOADS = [
    *(Workload(H=H, T=T, sparsity=0.9) for H, T in ((256, 100), (512, 100), (1024, 100), (2048, 50))),
    Workload(cell="LSTM", H=512, sparsity=0.9),
]


@pytest.mark.parametrize("contender", CONTENDERS, ids=str)
@pytest.mark.parametrize("work", WORKLOADS, ids=str)
def bench_peers(benchmark, work: Workload, contender: Contender):
    measure(benchmark, work, contender)
