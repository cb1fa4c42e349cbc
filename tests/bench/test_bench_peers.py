"""Every peer gives the layer's result, for every cell that it takes. Those not installed are skipped."""

import pytest
import torch

from bench.budgets import assert_within_budget
from bench.cpu.peers import PEERS, TorchCompile
from bench.workloads import LAYERS, Workload

QUICK_PEERS = [peer for peer in PEERS if not isinstance(peer, TorchCompile)]  # it compiles for seconds


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize("peer", QUICK_PEERS, ids=str)
def test_result(peer, cell, B):
    work = Workload(cell=cell, H=48, sparsity=0.5, T=5, B=B)
    expected, run = peer.prepare(work)
    assert expected is work
    with torch.inference_mode():
        assert_within_budget(torch.as_tensor(run()), work, peer.precision)
