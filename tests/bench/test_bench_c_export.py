"""What is compared with the C export gives the layer's result, one step at a time."""

import shutil

import pytest
import torch

from bench.budgets import assert_within_budget
from bench.cpu.bench_c_export import WORKLOADS
from bench.cpu.c_step import CONTENDERS, precision, ready
from bench.workloads import Workload
from triton_sparse_rnn.sparse.patterns import Blocks
from triton_sparse_rnn.sparse.picks import Picks


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("pattern", [Blocks(16, 1), Picks()], ids=str)
@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
@pytest.mark.parametrize("label", CONTENDERS)
def test_result(label, cell, pattern, dtype):
    if label == "C export" and shutil.which("cc") is None:
        pytest.skip("cc is not installed")
    work = Workload(cell=cell, H=48, sparsity=0.5, T=5, pattern=pattern)
    with torch.inference_mode():
        run = ready(label, work, dtype)
        for _ in range(2):
            assert_within_budget(run(), work, precision(dtype))


def test_workloads():
    assert {work.H for work in WORKLOADS} >= {256, 512}
    assert all(work.B == 1 for work in WORKLOADS)
