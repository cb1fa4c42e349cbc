"""Pruning by picks, of which a mask alone does not tell the weights: whoever prunes must ask the pattern."""

import io
import itertools

import pytest
import torch
from pruner_training import attached, gru, masked_everywhere, train
from torch import nn

from triton_sparse_rnn import (
    Blocks,
    ConstantMask,
    OneShot,
    Picks,
    PolynomialDecay,
    Pruner,
    ThresholdRamp,
    forecast,
    group_lasso,
)
from triton_sparse_rnn.sparse.blocks import to_blocks

PATTERN = Picks(4, 8)
DECAY = PolynomialDecay(final_sparsity=0.75, begin_step=1, end_step=7, frequency=2)


@pytest.mark.parametrize("options", [{}, {"balanced": False}, {"balanced": False, "tie_gates": True}], ids=str)
def test_it_is_pruned_as_it_trains(options):
    layer, masks = gru(8, 32), []
    pruner, optimizer = attached(layer, DECAY, pattern=PATTERN, **options)
    train(layer, optimizer, 10, after=lambda: masks.append(pruner.masks["weight_hh_l0"]))
    assert pruner.finished
    assert pruner.sparsity == 0.75
    assert masked_everywhere(pruner, optimizer)
    assert not any((later & ~earlier).any() for earlier, later in itertools.pairwise(masks))
    banks = to_blocks(masks[-1].unflatten(0, (3, 32)), (4, 8))
    counts = banks.sum(-1)  # [gates, groups, banks, rows]
    assert (counts == counts[..., :1]).all()  # the rows of a group have equally many in a bank
    assert (banks != banks[..., :1, :]).any()  # but not in the same columns
    tied = counts[0].equal(counts[1]) and counts[0].equal(counts[2])
    assert pruner.balanced == (not options)
    assert (counts == 2).all() == pruner.balanced
    assert tied == (pruner.balanced or "tie_gates" in options)


def begin(steps=0, **options):
    """A layer, its pruner and its optimizer, trained for some steps."""
    layer = gru(8, 16)
    pruner, optimizer = attached(layer, DECAY, pattern=PATTERN, **options)
    train(layer, optimizer, steps)
    return layer, pruner, optimizer


def written(parts):
    """The state of everything, as a file."""
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    return file.getvalue()


def goes_on_to_the_bit(whole, order, **options):
    data, masks = written(whole), whole[1].masks
    resumed = begin(6, **options)  # a training that has come further, whose masks are forgotten
    state = torch.load(io.BytesIO(data), weights_only=True)
    for place in order:
        resumed[place].load_state_dict(state[place])
    assert all(torch.equal(mask, resumed[1].masks[name]) for name, mask in masks.items())
    assert written(resumed) == data
    for parts in (whole, resumed):
        train(parts[0], parts[2], 5)
        assert not any((parts[1].masks[name] & ~mask).any() for name, mask in masks.items())
        assert masked_everywhere(parts[1], parts[2])
    assert written(resumed) == written(whole)


@pytest.mark.parametrize("options", [{}, {"tie_gates": True}, {"score": "mean", "balanced": False}], ids=str)
def test_a_checkpoint_goes_on_to_the_bit(options):
    whole = begin(4, **options)
    saved = whole[1].state_dict()["weights"]["weight_hh_l0"]
    assert saved.keys() == {"shape", "schedules", "mask"}
    assert saved["mask"].nbytes == (1 if "tie_gates" in options else 3) * 4 * 16 // 8  # a bit for each unit
    goes_on_to_the_bit(whole, (0, 1, 2), **options)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_kept_weights_that_are_zero_are_in_the_checkpoint(order):
    whole = begin(4)
    with torch.no_grad():  # as some become in 16 bits; by the weights alone they look like pruned ones
        for weight in whole[1].weights:
            weight.parameter[:, ::2] = 0
    weights = whole[1].state_dict()["weights"]
    assert weights["weight_hh_l0"]["kept"].nbytes == 48 * 16 // 8
    goes_on_to_the_bit(whole, order)


@pytest.mark.parametrize("steps", [2, 6])
def test_a_mask_before_its_weights_is_refused_and_changes_nothing(steps):
    state, (layer, pruner, optimizer) = begin(4)[1].state_dict(), begin(steps)
    before, masks = written((layer, pruner, optimizer)), pruner.masks
    with pytest.raises(ValueError, match="weight_ih_l0 that does not fit its zeros: load the model's state_dict first"):
        pruner.load_state_dict(state)
    assert written((layer, pruner, optimizer)) == before
    assert all(torch.equal(mask, pruner.masks[name]) for name, mask in masks.items())
    fresh = begin()
    nn.init.zeros_(fresh[0].weight_hh_l0)
    fresh[1].load_state_dict(begin()[1].state_dict())  # nothing is pruned so far: any weights fit
    assert fresh[1].sparsity == 0


def test_weights_that_became_zero_in_a_narrower_dtype_do_not_tell_their_mask():
    layer, pruner, _optimizer = begin(4)
    kept = pruner.masks["weight_hh_l0"].nonzero()[0]
    with torch.no_grad():
        layer.weight_hh_l0[tuple(kept)] = 1e-9
    half = gru(8, 16).half()
    half.load_state_dict(layer.state_dict())
    with pytest.raises(ValueError, match=r"weight_hh_l0 that does not fit its zeros: .* first, in the dtype it was in"):
        Pruner(half, DECAY, pattern=PATTERN).load_state_dict(pruner.state_dict())


def flip(name, *entries):
    def damage(state):
        for entry in entries:
            state["weights"]["weight_hh_l0"][name][entry // 8] ^= 1 << entry % 8

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip("mask", 7), r"damaged mask for weight_hh_l0: it is none of Picks\(rows=4, bank=8, columns=1\)"),
        (flip("mask", 7, 0), r"damaged mask for weight_hh_l0: it is none of Picks"),
        (flip("kept", 0), r"damaged mask for weight_hh_l0: it is none of Picks"),
        (
            lambda state: state["weights"]["weight_hh_l0"].update(kept=torch.zeros(95, dtype=torch.uint8)),
            r"damaged mask for weight_hh_l0: expected uint8 \[96\] for 768 weights, got torch.uint8 \[95\]",
        ),
        (
            lambda state: state["weights"]["weight_hh_l0"].update(more=1),
            "weight_hh_l0 does not fit this pruner: missing none; unexpected more",
        ),
    ],
    ids=["largest of a bank pruned", "and the smallest kept", "one more weight", "short", "unknown"],
)
def test_damaged_masks_are_refused(damage, message):
    whole = begin(4)
    with torch.no_grad():
        whole[0].weight_hh_l0.zero_()
    state = whole[1].state_dict()
    before = written(whole)
    damage(state)
    with pytest.raises(ValueError, match=message):
        whole[1].load_state_dict(state)
    assert written(whole) == before


def test_blocks_have_no_weights_in_their_state():
    layer = gru(8, 16)
    pruner, _optimizer = attached(layer, OneShot(sparsity=0.5, step=1), pattern=Blocks())
    state = pruner.state_dict()
    state["weights"]["weight_hh_l0"]["kept"] = torch.zeros(96, dtype=torch.uint8)
    with pytest.raises(ValueError, match="missing none; unexpected kept"):
        pruner.load_state_dict(state)


def test_another_pattern_refuses_a_checkpoint():
    layer, pruner, _optimizer = begin(4)
    state = pruner.state_dict()
    with pytest.raises(ValueError, match=r"pattern='Picks\(.*bank=8.*' in state_dict, but .* has 'Picks\(.*bank=32,"):
        Pruner(layer, DECAY, pattern=Picks(4)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"pattern='Picks\(.*' in state_dict, but this pruner has 'Blocks\("):
        Pruner(layer, DECAY, pattern=Blocks()).load_state_dict(state)
    with pytest.raises(ValueError, match="balanced=True in state_dict, but this pruner has False"):
        Pruner(layer, DECAY, pattern=PATTERN, balanced=False).load_state_dict(state)


def test_what_others_write_between_updates_does_not_come_back():
    layer, pruner, optimizer = begin(4)
    masks = pruner.masks
    with torch.no_grad():
        layer.weight_hh_l0[~masks["weight_hh_l0"]] = 9.0
    with pytest.warns(UserWarning, match="pruned weights of weight_hh_l0 were written to"):
        train(layer, optimizer, 5)
    assert not any((pruner.masks[name] & ~mask).any() for name, mask in masks.items())


@pytest.mark.parametrize("options", [{}, {"balanced": False, "score": "max"}], ids=str)
def test_an_update_does_not_see_what_others_wrote_nor_takes_kept_zeros_for_pruned_ones(options):
    def run(stray):
        layer = gru(8, 16)
        layer.load_state_dict(start)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        pruner = Pruner(layer, DECAY, pattern=PATTERN, **options)
        train(layer, optimizer, 4, after=lambda: pruner.step(optimizer))
        masks = pruner.masks["weight_hh_l0"]
        train(layer, optimizer, 1)
        with torch.no_grad():
            layer.weight_hh_l0[:, ::3] = 0
            layer.weight_hh_l0[~masks] = stray
        pruner.step(optimizer)  # an update
        assert pruner.sparsities["weight_hh_l0"] > 1 - masks.float().mean()
        assert not (pruner.masks["weight_hh_l0"] & ~masks).any()
        return pruner.masks["weight_hh_l0"]

    start = gru(8, 16).state_dict()
    assert torch.equal(run(0.0), run(9.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_parameters_of_other_dtypes(dtype):
    weight = torch.randn(48, 20).to(dtype)
    weight[0, 3], weight[1, 4] = torch.nan, torch.inf
    model = nn.Linear(20, 48, bias=False, dtype=dtype)
    model.weight = nn.Parameter(weight.clone())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = Pruner(model, OneShot(sparsity=0.8, step=1), pattern=Picks(8, 8), include=("weight",))
    model.weight.grad = torch.zeros_like(weight)
    optimizer.step()
    pruner.step(optimizer)
    mask = pruner.masks["weight"]
    assert pruner.sparsity == 0.8
    assert mask[0, 3]
    assert mask[1, 4]
    assert torch.equal(model.weight.nan_to_num(7), weight.masked_fill(~mask, 0).nan_to_num(7))


def test_few_inputs_are_not_pruned_to_nothing():
    layer = gru(4, 64)
    pruner, optimizer = attached(layer, OneShot(sparsity=0.9, step=1), pattern=Picks())
    train(layer, optimizer, 1)
    counts = to_blocks(pruner.masks["weight_ih_l0"].unflatten(0, (3, 64)), (16, 4)).sum((-1, -2)).flatten(1)
    assert counts.sum(1).tolist() == [32, 32, 32]  # of 16 units of 16 weights two are kept
    assert counts.amax() == 16
    assert pruner.masks["weight_hh_l0"].view(3, 4, -1).sum(-1).unique().tolist() == [96, 112]
    with pytest.warns(UserWarning, match="weight_ih_l0 will be .* 4 picked units of 16x1 in 32 in each gate"):
        Pruner(gru(4, 16), OneShot(sparsity=0.9, step=1), pattern=Picks())


def test_balanced_by_rank_unless_told_otherwise_and_thresholds_are_free():
    assert Pruner(gru(8, 16), DECAY, pattern=PATTERN).balanced
    assert Pruner(gru(8, 16), DECAY).balanced
    assert not Pruner(gru(8, 16), DECAY, pattern=Blocks()).balanced
    layer = gru(8, 16)
    ramp = ThresholdRamp.from_weights(layer, 0.5, pattern=PATTERN, begin_step=0, ramp_step=1, end_step=4, frequency=1)
    pruner, optimizer = attached(layer, ramp, pattern=PATTERN)
    masks = []
    train(layer, optimizer, 6, after=lambda: masks.append(pruner.masks["weight_hh_l0"]))
    assert masked_everywhere(pruner, optimizer)
    assert not any((later & ~earlier).any() for earlier, later in itertools.pairwise(masks))
    with pytest.raises(ValueError, match=r"balanced=True needs a schedule by rank.* ThresholdRamp"):
        Pruner(gru(8, 16), ramp, pattern=PATTERN, balanced=True)


def test_zeros_are_kept_and_forecasts_and_penalties_are_its_own():
    layer = gru(8, 16)
    pruner, optimizer = attached(layer, OneShot(sparsity=0.5, step=1), pattern=PATTERN)
    told = forecast(layer, pruner)
    train(layer, optimizer, 1)
    assert told.sparsity == pruner.sparsity == 0.5
    kept = Pruner(layer, ConstantMask(), pattern=PATTERN)
    assert forecast(layer, kept) == told
    ramp = ThresholdRamp.from_weights(layer, 0.75, pattern=PATTERN, begin_step=0, ramp_step=1, end_step=2)
    assert forecast(layer, Pruner(layer, ramp, pattern=PATTERN)).sparsity == 0.75
    weights = (weight.stacked() for weight in pruner.weights)
    assert group_lasso(layer, PATTERN).item() == pytest.approx(
        sum(PATTERN.norms(each).sum().item() for each in weights)
    )
    with pytest.raises(
        ValueError,
        match="ConstantMask found no picked unit of 4x1 in 8 that is all zeros in weight_ih_l0, weight_hh_l0",
    ):
        Pruner(gru(8, 16), ConstantMask(), pattern=PATTERN)._start()
