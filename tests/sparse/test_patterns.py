import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from triton_sparse_rnn import (
    OneShot,
    PersistentGRU,
    Picks,
    Pruner,
    ThresholdRamp,
    group_lasso,
    sparsity_report,
    to_sparse,
)
from triton_sparse_rnn.sparse.block_matrix import STORAGE_DTYPES, BlockMatrix
from triton_sparse_rnn.sparse.patterns import Blocks, as_pattern

SINGLE = Blocks(1, 1)
SIZES = [(1, 1), (2, 3), (3, 1), (1, 4), (4, 2), (9, 9), (16, 1)]
FORMULAS = {
    "max": lambda block: block.abs().max(),
    "mean": lambda block: block.abs().mean(),
    "l2": lambda block: block.norm(),
}


@pytest.mark.parametrize("size", SIZES)
def test_units_that_hold_anything(size):
    pattern, (BR, BC) = Blocks(*size), size
    weight = torch.zeros(2, 7, 8)
    for gate, row, column in itertools.product(range(2), range(7), range(8)):
        weight[gate, row, column] = math.nan if row == column else 1e-44
        kept = pattern.kept(weight)
        assert kept.shape == pattern.mask_shape(2, 7, 8)
        assert kept.nonzero().tolist() == [[gate, row // BR, column // BC]]
        weight[gate, row, column] = -0.0


@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_bytes_are_those_of_a_block_matrix(size, dtype):
    pattern = Blocks(*size)
    for gates, rows, columns in itertools.product((1, 3), (1, 7, 16), (1, 8, 9)):
        weight = torch.randn(gates, rows, columns) * (torch.rand(gates, rows, columns) < 0.2)
        stored = BlockMatrix.from_dense(weight.flatten(0, 1), size, gates=gates, dtype=dtype)
        kept = int(pattern.kept(weight).sum())
        scales = dtype == torch.int8
        assert pattern.stored_bytes(kept, gates, rows, columns, dtype.itemsize, scales=scales) == stored.nbytes
        assert kept * pattern.unit_bytes(dtype.itemsize) == stored.values.nbytes + stored.columns.nbytes
        assert kept * pattern.products == stored.values.numel()


@pytest.mark.parametrize(("size", "vectors"), [((1, 3), 3), ((16, 2), 2), ((17, 2), 4), ((32, 1), 2)])
def test_a_vector_that_is_partly_empty_takes_as_long(size, vectors):
    assert Blocks(*size).vectors == vectors


def test_a_pair_of_integers_of_any_kind_is_blocks():
    for pair in ((8, 2), [8, 2], torch.Size([8, 2]), (np.int64(8), np.uint8(2)), Blocks(8, 2)):
        assert repr(as_pattern(pair)) == "Blocks(rows=8, columns=2)"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bad", [16, None, "ab", (16,), (16, 1, 1), (16.0, 1), (True, 1), (np.True_, 1), (np.float32(16), 1), ("16", "1")]
)
def test_what_is_no_pattern_is_named(bad):
    with pytest.raises(TypeError, match=r"^storage must be two integers .*, as in Blocks\(16, 1\), got"):
        as_pattern(bad, "storage")
    if isinstance(bad, tuple) and len(bad) == 2:
        with pytest.raises(TypeError, match=r"^rows and columns of Blocks must be two integers"):
            Blocks(*bad)


@pytest.mark.parametrize("bad", [(0, 1), (16, 0), (-4, 4)])
def test_sizes_below_one(bad):
    with pytest.raises(ValueError, match=r"^pattern must be at least \(1, 1\), got "):
        as_pattern(bad)
    with pytest.raises(ValueError, match=r"^rows and columns of Blocks must be at least \(1, 1\), got "):
        Blocks(*bad)


TAKES_A_PATTERN: dict[str, Callable[[nn.GRU, Any], object]] = {
    "Pruner": lambda layer, given: Pruner(layer, OneShot(sparsity=0.5, step=1), pattern=given),
    "from_weights": lambda layer, given: ThresholdRamp.from_weights(
        layer, 0.5, pattern=given, begin_step=0, ramp_step=1, end_step=2
    ),
    "group_lasso": lambda layer, given: group_lasso(layer, pattern=given),
    "sparsity_report": lambda layer, given: sparsity_report(layer, pattern=given),
    "BlockMatrix": lambda layer, given: BlockMatrix.from_dense(layer.get_parameter("weight_ih_l0"), given, gates=3),
    "to_sparse": lambda layer, given: to_sparse(layer, storage=given),
    "PersistentGRU": lambda layer, given: PersistentGRU.from_dense(layer, storage=given),
}


@pytest.mark.parametrize("function", TAKES_A_PATTERN)
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (16, TypeError, r"must be two integers \(rows, columns\)"),
        ((16, 0), ValueError, r"must be at least \(1, 1\), got \(16, 0\)"),
        (Blocks(10**9), ValueError, r"must be at most \(4096, 4096\) for .* of 7 x 5, got \(1000000000, 1\)"),
        (Blocks(1, 10**9), ValueError, r"must be at most \(4096, 4096\) for .* of 7 x 5, got \(1, 1000000000\)"),
        (Picks(10**9), ValueError, r"must be at most \(4096, 4096\) for .* of 7 x 5, got \(1000000000, 1\)"),
    ],
)
def test_whoever_takes_a_pattern_names_the_argument(function, given, error, message):
    argument = "storage" if function in ("to_sparse", "PersistentGRU") else "pattern"
    with pytest.raises(error, match=rf"^{argument} {message}"):
        TAKES_A_PATTERN[function](nn.GRU(5, 7), given)


@pytest.mark.parametrize("score", FORMULAS)
@pytest.mark.parametrize("block_size", [(1, 1), (2, 3), (3, 1), (1, 4), (4, 2), (9, 9)])
def test_every_remainder_of_a_block_is_scored_by_its_real_weights(score, block_size):
    BR, BC = block_size
    for H in range(1, 7):
        for C in range(1, 7):
            weight = torch.randn(2, H, C, dtype=torch.float64)
            expected = [
                [
                    [FORMULAS[score](gate[row : row + BR, column : column + BC]) for column in range(0, C, BC)]
                    for row in range(0, H, BR)
                ]
                for gate in weight
            ]
            torch.testing.assert_close(Blocks(*block_size).scores(weight, score), torch.tensor(expected).double())


def test_counts_of_edge_blocks():
    assert Blocks(2, 2).weight_counts(5, 3, torch.device("cpu")).tolist() == [[4, 2], [4, 2], [2, 1]]


@pytest.mark.parametrize("score", FORMULAS)
def test_nan_and_infinity_score_highest(score):
    weight = torch.tensor([[[1.0, math.nan, 3.0, -math.inf]]])
    assert Blocks(1, 1).scores(weight, score).tolist() == [[[1.0, math.inf, 3.0, math.inf]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_are_added_up_in_float32(dtype):
    weight = torch.full((1, 16, 64), 300.0, dtype=dtype)
    assert Blocks(16, 64).scores(weight, "mean").item() == pytest.approx(300)
    assert Blocks(16, 64).scores(weight, "l2").item() == pytest.approx(300 * 32)


def test_no_weight_is_so_small_that_its_block_scores_zero():
    weight = torch.full((1, 1, 1), 1e-44)
    assert all(Blocks(2, 2).scores(weight, score).item() > 0 for score in FORMULAS)


@pytest.mark.parametrize("score", FORMULAS)
def test_tied_gates_score_as_one_block(score):
    weight = torch.randn(3, 4, 5)
    together = Blocks(2, 1).combine_gates(Blocks(2, 1).scores(weight, score), score)
    stacked = weight.view(3, 2, 2, 5).transpose(0, 1).reshape(1, 12, 5)  # the same weights in blocks of 6 x 1
    torch.testing.assert_close(together, Blocks(6, 1).scores(stacked, score))


def test_unknown_score_is_refused():
    with pytest.raises(ValueError, match="score must be one of 'max', 'mean', 'l2', got 'min'"):
        Blocks(1, 1).scores(torch.ones(1, 1, 1), "min")


def everything(scores):
    return torch.ones_like(scores, dtype=torch.bool)


@pytest.mark.parametrize("sparsity", [0.0, 0.049, 0.35, 0.5, 0.8, 0.999])
@pytest.mark.parametrize("balanced", [False, True])
def test_choice_is_that_of_a_stable_sort(sparsity, balanced):
    scores = torch.randint(4, (6, 9)).double()
    scores[scores == 3] = math.inf
    rows = scores if balanced else scores.view(1, -1)
    lowest = rows.sort(dim=-1, stable=True).indices[:, : round(sparsity * rows.shape[1])]
    expected = torch.ones_like(rows, dtype=torch.bool).scatter(1, lowest, False).view_as(scores)
    assert torch.equal(SINGLE.prune_to_sparsity(scores, everything(scores), sparsity, balanced=balanced), expected)


def test_pruned_units_stay_pruned_and_count():
    scores = torch.arange(10.0).view(2, 5)
    kept = scores != 9  # the best one is pruned already
    after = SINGLE.prune_to_sparsity(scores, kept, 0.3)
    assert scores[~after].tolist() == [0, 1, 9]
    assert torch.equal(SINGLE.prune_to_sparsity(scores, after, 0.1), after)
    assert not SINGLE.prune_to_threshold(torch.full((2, 5), 9.0), kept, 1.0)[1, 4]


def test_threshold_is_inclusive():
    scores = torch.tensor([[0.0, 0.5, 0.50001, math.inf]])
    assert SINGLE.prune_to_threshold(scores, everything(scores), 0.5).tolist() == [[False, False, True, True]]
