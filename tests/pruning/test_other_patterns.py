"""Pruning by a pattern of which a mask alone does not tell the weights: whoever prunes must ask the pattern."""

import copy
import dataclasses
import itertools

import pytest
import torch
from pruner_training import attached, gru, masked_everywhere, train

from triton_sparse_rnn.pruning import (
    ConstantMask,
    OneShot,
    PolynomialDecay,
    Pruner,
    ThresholdRamp,
    forecast,
    group_lasso,
)
from triton_sparse_rnn.sparse.blocks import count_blocks, from_blocks, to_blocks
from triton_sparse_rnn.sparse.patterns import Pattern

DECAY = PolynomialDecay(final_sparsity=0.75, begin_step=1, end_step=7, frequency=2)


@dataclasses.dataclass(frozen=True)
class Largest(Pattern):
    """In each bank of columns the j-th largest weights of 4 rows are a unit, wherever in the bank each row has its own.

    A mask is [G, groups of rows, banks, j].
    """

    bank: int = 4

    @property
    def block_size(self):
        return 4, 1

    def describe(self, count=None):
        return "vector" if count is None else f"{count} vectors"

    def check_size(self, rows, columns, where):
        assert columns

    def mask_shape(self, gates, rows, columns):
        return gates, *count_blocks(rows, columns, (4, self.bank)), self.bank

    def weight_counts(self, rows, columns, device):
        return self._ranked(torch.ones(1, rows, columns, device=device))[0].long().sum(-2)

    def kept(self, weight):
        return self._ranked(weight).ne(0).any(-2)

    def scores(self, weight, score):
        assert score == "l2"
        return self.norms(weight)

    def norms(self, weight):
        return torch.linalg.vector_norm(self._ranked(weight), dim=-2)

    def spread(self, mask, weight):
        order = to_blocks(weight.abs(), (4, self.bank)).argsort(dim=-1, descending=True, stable=True)
        kept = order.argsort(-1) < mask.sum(-1)[..., None, None]
        return from_blocks(kept, *weight.shape[1:])

    def pruned_places(self, mask, weight, most):
        return (~self.spread(mask, weight)).flatten().nonzero().flatten()[:most]

    def in_whole_vectors(self):
        return None

    def _ranked(self, weight):
        """[G, groups, banks, 4, j]."""
        return to_blocks(weight.abs(), (4, self.bank)).sort(dim=-1, descending=True, stable=True).values


@pytest.mark.parametrize("options", [{}, {"balanced": True}, {"tie_gates": True}], ids=str)
def test_it_is_pruned_as_it_trains(options):
    layer, masks = gru(8, 12), []
    pruner, optimizer = attached(layer, DECAY, pattern=Largest(), **options)
    train(layer, optimizer, 10, after=lambda: masks.append(pruner.masks["weight_hh_l0"]))
    assert pruner.finished
    assert pruner.sparsity == 0.75
    assert masked_everywhere(pruner, optimizer)
    assert not any((later & ~earlier).any() for earlier, later in itertools.pairwise(masks))
    counts = to_blocks(masks[-1].unflatten(0, (3, 12)), (4, 4)).sum(-1)
    assert (counts == counts[..., :1]).all()  # the rows of a group have equally many in a bank
    columns = masks[-1].nonzero()[:, 1]
    assert len(columns.unique()) == 12  # but not in the same columns
    tied = counts[0].equal(counts[1]) and counts[0].equal(counts[2])
    assert tied == bool(options.get("tie_gates"))


def test_a_checkpoint_goes_on_and_another_pattern_refuses_it():
    def start():
        layer = gru(8, 12)
        return layer, *attached(layer, DECAY, pattern=Largest())

    layer, pruner, optimizer = start()
    train(layer, optimizer, 4)
    saved = copy.deepcopy([each.state_dict() for each in (layer, pruner, optimizer)])
    train(layer, optimizer, 5)
    other = start()
    for each, state in zip(other, saved, strict=True):
        each.load_state_dict(state)
    train(other[0], other[2], 5)
    assert all(torch.equal(mask, other[1].masks[name]) for name, mask in pruner.masks.items())
    with pytest.raises(ValueError, match=r"pattern='Largest\(bank=4\)' in state_dict, but this pruner has 'Largest\(b"):
        Pruner(layer, DECAY, pattern=Largest(2)).load_state_dict(saved[1])
    with pytest.raises(ValueError, match=r"pattern='Largest\(bank=4\)' in state_dict, but this pruner has 'Blocks\("):
        Pruner(layer, DECAY).load_state_dict(saved[1])


def test_zeros_are_kept_and_forecasts_and_penalties_are_its_own():
    layer = gru(8, 12)
    pruner, optimizer = attached(layer, OneShot(sparsity=0.5, step=1), pattern=Largest())
    told = forecast(layer, pruner)
    train(layer, optimizer, 1)
    assert told.sparsity == pruner.sparsity == 0.5
    kept = Pruner(layer, ConstantMask(), pattern=Largest())
    assert forecast(layer, kept) == told
    ramp = ThresholdRamp.from_weights(layer, 0.75, pattern=Largest(), begin_step=0, ramp_step=1, end_step=2)
    assert forecast(layer, Pruner(layer, ramp, pattern=Largest())).sparsity == 0.75
    weights = (weight.stacked() for weight in pruner.weights)
    assert group_lasso(layer, Largest()).item() == pytest.approx(
        sum(Largest().norms(each).sum().item() for each in weights)
    )
    with pytest.raises(
        ValueError, match="ConstantMask found no vector that is all zeros in weight_ih_l0, weight_hh_l0"
    ):
        Pruner(gru(8, 12), ConstantMask(), pattern=Largest())._start()
