"""One GRU layer at inference on one thread: whole sequences, batches, and single steps of a stream."""

import pytest
import torch

from bench.contenders import Contender, Dense, Ours, OursWithoutZeros
from bench.workloads import Workload, assert_within_budget, workload

SEQUENCES = [workload(H, sparsity) for H in (256, 512, 1024) for sparsity in (0.8, 0.9, 0.95)]
BATCHES = [workload(512, sparsity, T=50, B=B) for B in (4, 16, 32) for sparsity in (0.8, 0.9)]
STREAMS = [workload(H, 0.9, T=1) for H in (256, 512, 1024)]
CONTENDERS = (Dense(), Ours(), OursWithoutZeros())


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
@pytest.mark.parametrize("work", SEQUENCES + BATCHES + STREAMS, ids=str)
def bench_gru_forward(benchmark, work: Workload, contender: Contender):
    layer, run = contender.prepare(work)
    with torch.inference_mode():
        assert_within_budget(run(), layer, work.x)
        benchmark.group = str(work)
        benchmark.extra_info.update(work.facts(), contender=contender.name)
        benchmark(run)
