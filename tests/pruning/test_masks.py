import math

import pytest
import torch

from triton_sparse_rnn.pruning.masks import (
    kept_bits,
    pack_bits,
    prune_to_sparsity,
    prune_to_threshold,
    unpack_bits,
    zero_pruned,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def everything(scores):
    return torch.ones_like(scores, dtype=torch.bool)


@pytest.mark.parametrize("sparsity", [0.0, 0.049, 0.3, 0.5, 0.77, 0.999])
def test_the_lowest_blocks_go_and_exactly_as_many_as_asked(sparsity):
    scores = torch.rand(5, 7)
    kept = prune_to_sparsity(scores, everything(scores), sparsity)
    count = round(sparsity * 35)
    assert kept.sum() == 35 - count
    if 0 < count < 35:
        assert scores[~kept].max() < scores[kept].min()


def test_equal_scores_go_in_order():
    scores = torch.full((3, 40), 0.5)
    kept = prune_to_sparsity(scores, everything(scores), 0.5)
    assert kept.flatten().tolist() == [False] * 60 + [True] * 60


@pytest.mark.parametrize("sparsity", [0.1, 0.35, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("balanced", [False, True])
def test_choice_is_that_of_a_stable_sort(sparsity, balanced):
    scores = torch.randint(4, (6, 9)).double()
    scores[scores == 3] = math.inf
    rows = scores if balanced else scores.view(1, -1)
    lowest = rows.sort(dim=-1, stable=True).indices[:, : round(sparsity * rows.shape[1])]
    expected = torch.ones_like(rows, dtype=torch.bool).scatter(1, lowest, False).view_as(scores)
    assert torch.equal(prune_to_sparsity(scores, everything(scores), sparsity, balanced=balanced), expected)


def test_pruned_blocks_stay_pruned_and_count():
    scores = torch.arange(10.0).view(2, 5)
    kept = scores != 9  # the best one is pruned already
    after = prune_to_sparsity(scores, kept, 0.3)
    assert scores[~after].tolist() == [0, 1, 9]
    assert torch.equal(prune_to_sparsity(scores, after, 0.1), after)
    assert not prune_to_threshold(torch.full((2, 5), 9.0), kept, 1.0)[1, 4]


def test_balanced_prunes_every_block_row_alike():
    scores = torch.rand(6, 11)
    scores[0] += 100
    kept = prune_to_sparsity(scores, everything(scores), 0.4, balanced=True)
    assert (~kept).sum(-1).tolist() == [4] * 6


def test_threshold_is_inclusive():
    scores = torch.tensor([[0.0, 0.5, 0.50001, math.inf]])
    assert prune_to_threshold(scores, everything(scores), 0.5).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeroing_touches_pruned_entries_only(dtype):
    block_mask = torch.tensor([[[True, False]], [[False, True]]])  # two gates of 3 x 3 in blocks of 4 x 2
    bits = kept_bits(block_mask, (4, 2), torch.Size([6, 3]), dtype)
    mask = torch.tensor([[True, True, False]] * 3 + [[False, False, True]] * 3)
    assert torch.equal(bits.ne(0), mask)
    values = torch.tensor([1.5, -0.0, math.inf, -math.inf, math.nan, 6e-8], dtype=dtype).repeat(3).view(6, 3)
    zeroed = values.clone()
    zero_pruned(zeroed, bits)
    assert torch.equal(zeroed.nan_to_num(77), values.masked_fill(~mask, 0.0).nan_to_num(77))
    assert torch.equal(zeroed.signbit(), values.signbit() & mask)


def test_zeroing_takes_parameters_other_dtypes_and_strides():
    bits = kept_bits(torch.tensor([[[True, False]]]), (5, 1), torch.Size([5, 2]), torch.bfloat16)
    parameter = torch.nn.Parameter(torch.ones(5, 2))
    strided = torch.ones(2, 10, dtype=torch.float64).t()[::2]
    for tensor in (parameter, strided):
        zero_pruned(tensor, bits)
        assert tensor.tolist() == [[1, 0]] * 5
    assert parameter.requires_grad


def test_convolution_shape_is_taken_flat():
    bits = kept_bits(torch.tensor([[[True, False, True]]]), (2, 2), torch.Size([2, 2, 3]), torch.float32)
    assert bits.ne(0).flatten(1).tolist() == [[True, True, False, False, True, True]] * 2


@pytest.mark.parametrize("count", range(18))
def test_packed_bits_come_back(count):
    mask = torch.rand(count) < 0.5
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-count // 8)
    assert torch.equal(unpack_bits(packed, (count,)), mask)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (torch.zeros(2, dtype=torch.uint8), "expected uint8 \\[1\\] for 6 blocks, got torch.uint8 \\[2\\]"),
        (torch.zeros(1, dtype=torch.int8), "got torch.int8"),
        (torch.zeros(1, 1, dtype=torch.uint8), "got torch.uint8 \\[1, 1\\]"),
        ([0], "got list"),
        (torch.tensor([64], dtype=torch.uint8), "bits are set beyond the 6 blocks"),
    ],
)
def test_damaged_bits_are_refused(packed, message):
    with pytest.raises(ValueError, match=message):
        unpack_bits(packed, (2, 3))
