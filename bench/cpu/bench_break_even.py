"""From which sparsity on ours is the faster one: `python -m bench.report FILE --break-even` reads it off.

Of the peers in float32 onnxruntime is the one to beat here: bench_peers.py has them all, and torch CSR catches up
with it only around 80 % zeros, where ours is far ahead.
"""

import pytest

from bench.contenders import Contender, Dense, Ours, measure
from bench.cpu.peers import OnnxRuntime
from bench.workloads import Workload
from triton_sparse_rnn.sparse.picks import Picks

WORKLOADS = [
    Workload(H=H, T=T, sparsity=sparsity)
    for H, T in ((256, 100), (512, 100), (1024, 50), (2048, 20))
    for sparsity in (0.0, 0.2, 0.4, 0.6, 0.7, 0.8)
]


@pytest.mark.parametrize("contender", [Dense(), OnnxRuntime(), Ours(), Ours(pattern=Picks())], ids=str)
@pytest.mark.parametrize("work", WORKLOADS, ids=str)
def bench_break_even(benchmark, work: Workload, contender: Contender):
    measure(benchmark, work, contender)
