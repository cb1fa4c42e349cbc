"""The suite of linear layers: what it runs is right, and what is wrong is not timed."""

from typing import Any

import pytest
import torch

from bench.cpu.linear import LinearWork, OurLinear, TorchLinear, measure
from triton_sparse_rnn.sparse.picks import Picks

WORK = LinearWork(size=64, B=3, sparsity=0.9)
OURS = [
    OurLinear(),
    OurLinear(Picks()),
    OurLinear(weight_dtype=torch.int8),
    OurLinear(Picks(), weight_dtype=torch.int8, activation_dtype=torch.int8),
]


class Benchmark:
    """pytest-benchmark's fixture, but for the clock."""

    def __init__(self):
        self.group, self.extra_info, self.calls = "", {}, 0

    def __call__(self, run):
        run()
        self.calls += 1


@pytest.mark.parametrize("contender", [TorchLinear(), *OURS], ids=str)
def test_every_contender_is_right_and_timed(contender):
    benchmark = Benchmark()
    measure(benchmark, WORK, contender)
    assert benchmark.calls == 1
    assert benchmark.group == "linear   64 B= 3 90% zeros"
    facts: dict[str, Any] = benchmark.extra_info
    assert (facts["cell"], facts["H"], facts["B"], facts["sparsity"]) == ("linear", 64, 3, 0.9)
    assert facts["contender"] == str(contender)


@pytest.mark.parametrize("pattern", [OurLinear().pattern, Picks()], ids=str)
def test_as_many_weights_are_kept_in_either_pattern(pattern):
    weight = WORK.pruned_in(pattern).layer.weight
    assert weight.count_nonzero() / weight.numel() == pytest.approx(0.1, abs=0.02)


def test_a_wrong_result_is_not_timed(monkeypatch):
    benchmark, right = Benchmark(), TorchLinear().prepare(WORK)
    monkeypatch.setattr(TorchLinear, "prepare", lambda self, work: (right[0], right[1] + 1e-3))
    with pytest.raises(AssertionError, match=r"F\.linear is wrong by 0\.001"):
        measure(benchmark, WORK, TorchLinear())
    assert benchmark.calls == 0
