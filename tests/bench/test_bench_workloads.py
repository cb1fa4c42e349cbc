"""Patterns of workloads: exactly as many weights are kept, where the masks say, and reports can read which."""

import pytest
import torch

from bench.budgets import assert_within_budget
from bench.contenders import Ours
from bench.workloads import MASKS, Workload, pattern_name
from triton_sparse_rnn import PersistentGRU
from triton_sparse_rnn.sparse.patterns import Blocks
from triton_sparse_rnn.sparse.picks import Picks

PATTERNS = [Blocks(16, 1), Blocks(1, 1), Blocks(8, 4), Picks(), Picks(8, 16, 2)]


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=pattern_name)
@pytest.mark.parametrize("sparsity", [0.0, 0.8])
def test_as_many_weights_are_kept_as_asked_for(pattern, masks, sparsity):
    work = Workload(H=64, sparsity=sparsity, pattern=pattern, masks=masks)
    by_gate = work.layer.get_parameter("weight_hh_l0").view(3, 64, 64)
    kept = pattern.kept(by_gate)
    together = pattern.count_units(64, 64, balanced=masks == "balanced")
    units = kept[0].numel() // together * (together - round(sparsity * together))
    assert kept.sum((1, 2)).tolist() == [units] * 3
    assert int(by_gate.count_nonzero()) == 3 * units * pattern.products  # rows are not padded


def test_balanced_banks_of_a_unit_group_differ_by_one():
    weight = Workload(H=96, sparsity=0.8, pattern=Picks(), masks="balanced").layer.get_parameter("weight_hh_l0")
    counts = weight.ne(0).view(3, 6, 16, 3, 32).sum(-1)
    assert (counts == counts[:, :, :1]).all()  # in every row
    assert int((counts.amax(-1) - counts.amin(-1)).max()) == 1


def test_weights_in_picks_are_as_large_as_in_blocks():
    sizes = [
        Workload(H=64, sparsity=0.9, pattern=pattern).layer.get_parameter("weight_hh_l0").norm()
        for pattern in (Blocks(16, 1), Picks())
    ]
    torch.testing.assert_close(*sizes, rtol=0.1, atol=0)


def test_facts_name_the_pattern_and_blocks_as_they_always_were():
    work = Workload(H=64, sparsity=0.5)
    assert work.facts()["block_size"] == [16, 1]
    assert "90% zeros in 16x1" in str(Workload(H=64, sparsity=0.9))
    picked = work.pruned_in(Picks())
    assert picked.facts()["pattern"] == repr(Picks())
    assert "block_size" not in picked.facts()
    assert str(picked).endswith("50% zeros in picks 16x1 of 32, balanced")


@pytest.mark.parametrize(
    ("ours", "name"),
    [
        (Ours(), "PersistentGRU"),
        (Ours(pattern=Blocks(16, 4)), "PersistentGRU, 16x4"),
        (Ours(pattern=Picks(16, 64, 4)), "PersistentGRU, picks 16x4 of 64"),
        (Ours(pattern=Blocks(1, 1), chooses=True), "PersistentGRU, 1x1, storage=None"),
        (Ours(torch.int8, torch.int8, zeros=False), "PersistentGRU, int8, 0 % zeros"),
    ],
)
@pytest.mark.parametrize("T", [1, 3])
def test_ours_runs_the_layer_that_it_says(ours, name, T):
    work = Workload(H=64, sparsity=0.8, T=T)
    assert ours.name(work) == name
    expected, run = ours.prepare(work)
    assert expected.pattern == (ours.pattern or work.pattern)
    assert_within_budget(run(), expected, ours.precision)


def test_a_single_step_can_be_a_call_of_the_layer(monkeypatch):
    monkeypatch.setattr(PersistentGRU, "step", None)
    work = Workload(H=32, sparsity=0.5, T=1)
    expected, run = Ours(steps=False).prepare(work)
    assert_within_budget(run(), expected, "float32")
    with pytest.raises(TypeError):
        Ours().prepare(work)[1]()
