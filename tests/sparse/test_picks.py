"""Picks against plain loops over every row and bank."""

import itertools
import math

import pytest
import torch

from triton_sparse_rnn import Picks
from triton_sparse_rnn.sparse.block_matrix import STORAGE_DTYPES

PATTERNS = [Picks(2, 8), Picks(3, 8, 2), Picks(1, 8, 4), Picks(16, 16, 4), Picks(4, 32), Picks(1, 64, 2)]
SHAPES = [(1, 1, 1), (2, 7, 8), (3, 5, 9), (1, 2, 15), (2, 17, 11), (1, 3, 33), (1, 4, 66)]
CASES = list(itertools.product(PATTERNS, SHAPES))
FORMULAS = {
    "max": lambda unit: max(unit),
    "mean": lambda unit: sum(unit) / len(unit),
    "l2": lambda unit: math.sqrt(sum(size * size for size in unit)),
}


def banks_of(columns, bank):
    return [range(first, min(first + bank, columns)) for first in range(0, columns, bank)]


def by_size(row, columns, pruned=()):
    """Columns of a bank in the order in which they are pruned."""
    sizes = [math.inf if math.isnan(size) else abs(size) for size in row.tolist()]
    return sorted(columns, key=lambda column: (-1.0 if column in pruned else sizes[column], column))


def units_of(weight, pattern):
    """For each gate and unit group the units: lists of (row, column)."""
    for gate, matrix in enumerate(weight):
        for first in range(0, len(matrix), pattern.rows):
            rows, units = range(first, min(first + pattern.rows, len(matrix))), []
            for columns in banks_of(matrix.shape[1], pattern.bank):
                order = {row: by_size(matrix[row], columns) for row in rows}
                start = -(-len(columns) // pattern.columns) * -pattern.columns
                for end in range(start + pattern.columns, 1, pattern.columns):
                    places = slice(max(0, len(columns) + end - pattern.columns), len(columns) + end)
                    units.append([(row, column) for row in rows for column in order[row][places]])
            yield gate, first // pattern.rows, units


def awkward(shape, generator):
    """Weights of both signs, many of equal size, some zero, NaN and infinite."""
    weight = torch.randint(-6, 7, shape, generator=generator).float() / 4
    weight[torch.rand(shape, generator=generator) < 0.02] = torch.nan
    weight[torch.rand(shape, generator=generator) < 0.02] = -torch.inf
    return weight


def random_mask(pattern, shape, generator):
    """One that a threshold over random scores leaves: of each bank its largest units."""
    scores = torch.rand(pattern.mask_shape(*shape), generator=generator)
    return pattern.prune_to_threshold(scores, torch.ones_like(scores, dtype=torch.bool), 0.5)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("score", FORMULAS)
@pytest.mark.parametrize(("pattern", "shape"), CASES, ids=str)
def test_units_are_ranks_in_each_row_of_a_bank(pattern, shape, score, generator):
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    scores, counts = pattern.scores(weight, score), pattern.weight_counts(*shape[1:], torch.device("cpu"))
    assert scores.shape == pattern.mask_shape(*shape) == pattern.full_mask(*shape).shape
    assert counts.shape == scores.shape[1:]
    assert counts.dtype == torch.int64
    for gate, group, units in units_of(weight, pattern):
        assert counts[group].tolist() == [len(unit) for unit in units]
        sizes = [[abs(weight[gate, row, column].item()) for row, column in unit] for unit in units]
        expected = torch.tensor([FORMULAS[score](unit) for unit in sizes], dtype=torch.float64)
        torch.testing.assert_close(scores[gate, group], expected)
        norms = torch.tensor([FORMULAS["l2"](unit) for unit in sizes], dtype=torch.float64)
        torch.testing.assert_close(pattern.norms(weight)[gate, group], norms)


@pytest.mark.parametrize(("pattern", "shape"), CASES, ids=str)
def test_a_mask_keeps_the_largest_and_nothing_comes_back(pattern, shape, generator):
    for _ in range(4):
        weight = awkward(shape, generator)
        mask = random_mask(pattern, shape, generator)
        before = pattern.spread(mask, weight)
        assert before.is_contiguous()
        assert int((~before).sum()) == pattern.pruned_weights(mask, *shape[1:])
        for gate, group, units in units_of(weight, pattern):
            for unit, kept in zip(units, mask[gate, group].tolist(), strict=True):
                assert all(before[gate, row, column] == kept for row, column in unit)
        later = awkward(shape, generator) * before  # kept ones may be zero now
        fewer = mask & random_mask(pattern, shape, generator)
        after = pattern.spread(fewer, later, before)
        assert not (after & ~before).any()
        assert int((~after).sum()) == pattern.pruned_weights(fewer, *shape[1:])
        assert torch.equal(after, pattern.spread(fewer, later.where(before, 9.0), before))
        for gate, row in itertools.product(range(shape[0]), range(shape[1])):
            for columns in banks_of(shape[2], pattern.bank):
                pruned = {column for column in columns if not before[gate, row, column]}
                order = by_size(later[gate, row], columns, pruned)
                kept = [bool(after[gate, row, column]) for column in order]
                assert kept == sorted(kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool])
def test_weights_of_any_dtype(dtype, generator):
    pattern, weight = Picks(2, 8, 2), torch.randint(0, 5, (2, 5, 19), generator=generator).to(dtype)
    mask = random_mask(pattern, weight.shape, generator)
    assert torch.equal(pattern.spread(mask, weight), pattern.spread(mask, weight.float()))
    assert torch.equal(pattern.kept(weight), pattern.kept(weight.float()))
    if dtype.is_floating_point:
        assert torch.equal(pattern.scores(weight, "max").float(), pattern.scores(weight.float(), "max"))


@pytest.mark.parametrize(("pattern", "shape"), CASES, ids=str)
def test_what_a_mask_keeps_is_found_again(pattern, shape, generator):
    mask = random_mask(pattern, shape, generator)
    weight = torch.rand(shape, generator=generator) + 1
    spread = pattern.spread(mask, weight)
    assert torch.equal(pattern.kept(weight * spread), mask)
    assert torch.equal(pattern.kept(spread), mask)
    assert torch.equal(pattern.spread(mask, spread), spread)
    one_less = spread.clone()
    one_less[:, ::2] = False  # rows of fewer weights than others of their unit group
    kept = pattern.kept(one_less)
    assert not (one_less & ~pattern.spread(kept, one_less)).any()
    assert not pattern.kept(torch.zeros(shape)).any()


@pytest.mark.parametrize(("pattern", "shape"), CASES, ids=str)
def test_samples_of_pruned_places(pattern, shape, generator):
    mask = random_mask(pattern, shape, generator)
    spread = pattern.spread(mask, torch.randn(shape, generator=generator))
    places = pattern.pruned_places(mask, spread, 50)
    assert len(places.unique()) == len(places) == min(50, int((~mask).sum()))
    assert not spread.flatten()[places].any()
    assert len(pattern.pruned_places(torch.ones_like(mask), spread, 50)) == 0


def test_nan_scores_highest_and_is_kept():
    weight = torch.tensor([[[1.0, torch.nan, 3.0, -4.0], [-torch.inf, 0.0, 1.0, 1.0]]])
    pattern = Picks(2, 8)
    for score in FORMULAS:
        assert pattern.scores(weight, score).isinf().tolist() == [[[False, False, False, True]]]
    last = torch.tensor([[[False, False, False, True]]])
    assert pattern.spread(last, weight)[0].nonzero().tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("score", FORMULAS)
@pytest.mark.parametrize("balanced", [False, True])
def test_equal_weights_are_pruned_from_the_first_and_of_each_bank_its_smallest(score, balanced):
    pattern = Picks(3, 8, 4)
    weight = torch.full((1, 3, 29), 0.1)  # 2, 2, 2 and 2 units, the last but one of a single weight
    scores = pattern.scores(weight, score)
    full = pattern.full_mask(1, 3, 29)
    for count in range(9):
        mask = pattern.prune_to_sparsity(scores[0], full[0], count / 8, balanced=balanced)
        assert int((~mask).sum()) == count
        assert not (mask.view(4, 2)[:, 0] & ~mask.view(4, 2)[:, 1]).any()


def counts_of(mask, pattern):
    return [
        mask[..., first : first + pattern.bank // pattern.columns].sum(-1)
        for first in range(0, mask.shape[-1], pattern.bank // pattern.columns)
    ]


@pytest.mark.parametrize(("pattern", "shape"), CASES, ids=str)
def test_balanced_counts_are_a_share_or_one_more(pattern, shape, generator):
    scores = pattern.scores(torch.randn(shape, generator=generator), "l2")[0]
    units = scores.shape[-1]
    sizes = [count.item() for count in counts_of(torch.ones(units, dtype=torch.bool), pattern)]
    for sparsity in (0.0, 0.3, 0.5, 0.77, 0.9, 0.99):
        mask = pattern.prune_to_sparsity(scores, torch.ones_like(scores, dtype=torch.bool), sparsity, balanced=True)
        total = mask.numel() - round(sparsity * mask.numel())
        share = total // len(mask)
        assert mask.sum() == total
        assert set(mask.sum(-1).tolist()) <= {share, share + 1}
        for size, count in zip(sizes, counts_of(mask, pattern), strict=True):
            assert set(count.tolist()) <= {share * size // units, share * size // units + 1}


@pytest.mark.parametrize("balanced", [False, True])
def test_gradual_pruning_is_exact_from_any_mask(balanced, generator):
    pattern, shape = Picks(4, 16, 2), (1, 10, 80)
    uneven = torch.arange(1.0, 801).view(shape)
    for free in (0.0, 0.4):
        scores = pattern.scores(uneven * torch.randn(shape, generator=generator), "l2")[0]
        mask = pattern.prune_to_sparsity(scores, torch.ones_like(scores, dtype=torch.bool), free)  # not balanced
        for sparsity in (0.2, 0.5, 0.5, 0.71, 0.9):
            later = pattern.prune_to_sparsity(scores, mask, sparsity, balanced=balanced)
            assert not (later & ~mask).any()
            assert later.sum() == min(int(mask.sum()), mask.numel() - round(sparsity * mask.numel()))
            mask, scores = later, pattern.scores(uneven * torch.randn(shape, generator=generator), "l2")[0]
        counts = torch.stack(counts_of(mask, pattern))  # [banks, unit groups]
        differ = max(int((counts.amax(0) - counts.amin(0)).max()), int(counts.sum(0).max() - counts.sum(0).min()))
        if not free:
            assert (differ <= 1) == balanced


@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
def test_bytes_of_what_is_stored(dtype):
    pattern = Picks(4, 8, 2)
    # 3 unit groups of 2 gates; 5 units of 8 values, 8 picks and a column
    scales = dtype == torch.int8
    expected = 5 * (8 * dtype.itemsize + 8 + 4) + 4 * (2 * 3 * 4 + 1) + 4 + scales * 4 * 2 * 9
    assert pattern.stored_bytes(5, 2, 9, 21, dtype.itemsize, scales=scales) == expected
    assert pattern.unit_bytes(dtype.itemsize) == 8 * dtype.itemsize + 8 + 4


def test_names_and_sizes():
    assert repr(Picks()) == "Picks(rows=16, bank=32, columns=1)"
    assert (Picks().describe(), Picks(8, 64, 4).describe(1200)) == (
        "picked unit of 16x1 in 32",
        "1,200 picked units of 8x4 in 64",
    )
    assert Picks(8, 64, 4).in_whole_vectors() == Picks(16, 64, 4)
    assert Picks(32).in_whole_vectors() is None
    assert (Picks(8, 64, 4).vectors, Picks(8, 64, 4).products, Picks(8, 64, 4).block_size) == (4, 32, (8, 4))
    Picks(4096, 64).check_size(3, 2, "a layer")
    with pytest.raises(ValueError, match=r"pattern must be at most \(4096, 4096\) for a layer of 3 x 2"):
        Picks(4097).check_size(3, 2, "a layer")


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ((0,), ValueError, "rows of Picks must be at least 1, got 0"),
        ((16, 24), ValueError, r"bank of Picks must be one of \(8, 16, 32, 64\), got 24"),
        ((16, 32, 3), ValueError, r"columns of Picks must be one of \(1, 2, 4\), got 3"),
        ((16.0,), TypeError, "rows of Picks must be an integer, got 16.0"),
        ((16, True), TypeError, "bank of Picks must be an integer, got True"),
    ],
)
def test_bad_sizes_are_named(sizes, error, message):
    with pytest.raises(error, match=message):
        Picks(*sizes)


def test_the_gradient_of_norms_goes_to_the_weights_of_a_unit_and_is_zero_at_zeros():
    weight = torch.tensor([[[3.0, 0.0, -1.0], [0.0, -4.0, 2.0]]], requires_grad=True)
    Picks(2, 8).norms(weight).sum().backward()
    assert weight.grad is not None
    expected = torch.tensor([[[0.6, 0.0, -1 / 5**0.5], [0.0, -0.8, 2 / 5**0.5]]])
    torch.testing.assert_close(weight.grad, expected)
