"""Pruning by picks, of which a mask alone does not tell the weights: whoever prunes must ask the pattern."""

import copy
import itertools

import pytest
import torch
from pruner_training import attached, gru, masked_everywhere, train

from triton_sparse_rnn import (
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


def test_a_checkpoint_goes_on_and_another_pattern_refuses_it():
    def start():
        layer = gru(8, 16)
        return layer, *attached(layer, DECAY, pattern=PATTERN)

    layer, pruner, optimizer = start()
    train(layer, optimizer, 4)
    saved = copy.deepcopy([each.state_dict() for each in (layer, pruner, optimizer)])
    train(layer, optimizer, 5)
    other = start()
    for each, state in zip(other, saved, strict=True):
        each.load_state_dict(state)
    train(other[0], other[2], 5)
    assert all(torch.equal(mask, other[1].masks[name]) for name, mask in pruner.masks.items())
    with pytest.raises(ValueError, match=r"pattern='Picks\(.*bank=8.*' in state_dict, but .* has 'Picks\(.*bank=32,"):
        Pruner(layer, DECAY, pattern=Picks(4)).load_state_dict(saved[1])
    with pytest.raises(ValueError, match=r"pattern='Picks\(.*' in state_dict, but this pruner has 'Blocks\("):
        Pruner(layer, DECAY).load_state_dict(saved[1])


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
        ValueError, match="ConstantMask found no picked unit of 4x1 that is all zeros in weight_ih_l0, weight_hh_l0"
    ):
        Pruner(gru(8, 16), ConstantMask(), pattern=PATTERN)._start()
