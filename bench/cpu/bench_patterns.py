"""Picks and single weights beside blocks, in whole layers on one thread: long sequences, batches, short calls.

All are rows of one group, so nn.GRU is timed once for them: a group is named after its layer in blocks, and a row that
is pruned in another pattern says so. The recurrence by itself: patterns.py. All peers: bench_peers.py.
"""

import pytest

from bench.contenders import Contender, Dense, Ours, measure
from bench.workloads import Workload
from triton_sparse_rnn.sparse.patterns import Blocks
from triton_sparse_rnn.sparse.picks import Picks

STEPS = {256: 1000, 512: 500, 1024: 150, 2048: 50}  # T for each H: a call's start is lost among them
PICKS, SINGLE_WEIGHTS = Ours(pattern=Picks()), Ours(pattern=Blocks(1, 1), chooses=True)
LAYERS = [*(("GRU", H) for H in STEPS), ("LSTM", 512)]
LONG = [Workload(cell=cell, H=H, T=STEPS[H], sparsity=0.9) for cell, H in LAYERS]
BATCHES = [Workload(H=512, T=50, B=B, sparsity=0.9) for B in (1, 2, 4, 8, 16, 32, 64, 128)]
SHORT = [Workload(H=H, T=T, sparsity=0.9) for H in STEPS for T in (10, 50)]
STREAMS = [Workload(H=H, T=1, sparsity=0.9) for H in STEPS]


@pytest.mark.parametrize("contender", [Dense(), Ours(), PICKS, SINGLE_WEIGHTS], ids=str)
@pytest.mark.parametrize("work", LONG, ids=str)
def bench_long_sequences(benchmark, work: Workload, contender: Contender):
    measure(benchmark, work, contender)


@pytest.mark.parametrize("contender", [Dense(), Ours(), PICKS], ids=str)
@pytest.mark.parametrize("work", dict.fromkeys(BATCHES + SHORT), ids=str)
def bench_batches_and_short_calls(benchmark, work: Workload, contender: Contender):
    measure(benchmark, work, contender)


@pytest.mark.parametrize(
    "contender",
    [Dense(), Ours(), PICKS, Ours(steps=False), Ours(pattern=Picks(), steps=False)],
    ids=str,
)
@pytest.mark.parametrize("work", STREAMS, ids=str)
def bench_single_steps(benchmark, work: Workload, contender: Contender):
    measure(benchmark, work, contender)
