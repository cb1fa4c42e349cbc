"""One layer at inference on one thread: whole sequences, batches, and single steps of a stream."""

import pytest

from bench.contenders import Contender, Dense, Ours, measure
from bench.workloads import Workload
from triton_sparse_rnn.sparse.picks import Picks

STEPS = {256: 100, 512: 100, 1024: 100, 2048: 50}  # T for each H
SEQUENCES = [Workload(H=H, T=T, sparsity=sparsity) for H, T in STEPS.items() for sparsity in (0.8, 0.9, 0.95)]
OTHER_CELLS = [Workload(cell=cell, H=H, T=T, sparsity=0.9) for cell in ("LSTM", "RNN_TANH") for H, T in STEPS.items()]
BATCHES = [
    Workload(H=H, T=T, B=B, sparsity=sparsity)
    for H, T, sizes in ((256, 50, (8, 32, 128)), (512, 50, (1, 2, 4, 8, 16, 32, 64, 128)), (1024, 20, (8, 32, 128)))
    for sparsity in (0.8, 0.9)
    for B in sizes
]
STREAMS = [Workload(H=H, T=1, sparsity=0.9) for H in STEPS]


@pytest.mark.parametrize("contender", [Dense(), Ours(), Ours(pattern=Picks()), Ours(zeros=False)], ids=str)
@pytest.mark.parametrize("work", SEQUENCES, ids=str)
def bench_gru_sequences(benchmark, work: Workload, contender: Contender):
    measure(benchmark, work, contender)


@pytest.mark.parametrize("contender", [Dense(), Ours(), Ours(pattern=Picks())], ids=str)
@pytest.mark.parametrize("work", OTHER_CELLS, ids=str)
def bench_other_cells(benchmark, work: Workload, contender: Contender):
    measure(benchmark, work, contender)


@pytest.mark.parametrize("contender", [Dense(), Ours()], ids=str)  # with picks: bench_patterns.py
@pytest.mark.parametrize("work", BATCHES + STREAMS, ids=str)
def bench_forward(benchmark, work: Workload, contender: Contender):
    measure(benchmark, work, contender)
