import math

import pytest
import torch

from triton_sparse_rnn.pruning.scores import block_scores, block_weight_counts, combine_gates

FORMULAS = {
    "max": lambda block: block.abs().max(),
    "mean": lambda block: block.abs().mean(),
    "l2": lambda block: block.norm(),
}


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
            torch.testing.assert_close(block_scores(weight, block_size, score), torch.tensor(expected).double())


def test_counts_of_edge_blocks():
    assert block_weight_counts((5, 3), (2, 2), torch.device("cpu")).tolist() == [[4, 2], [4, 2], [2, 1]]


@pytest.mark.parametrize("score", FORMULAS)
def test_nan_and_infinity_score_highest(score):
    weight = torch.tensor([[[1.0, math.nan, 3.0, -math.inf]]])
    assert block_scores(weight, (1, 1), score).tolist() == [[[1.0, math.inf, 3.0, math.inf]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_are_added_up_in_float32(dtype):
    weight = torch.full((1, 16, 64), 300.0, dtype=dtype)
    assert block_scores(weight, (16, 64), "mean").item() == pytest.approx(300)
    assert block_scores(weight, (16, 64), "l2").item() == pytest.approx(300 * 32)


def test_no_weight_is_so_small_that_its_block_scores_zero():
    weight = torch.full((1, 1, 1), 1e-44)
    assert all(block_scores(weight, (2, 2), score).item() > 0 for score in FORMULAS)


@pytest.mark.parametrize("score", FORMULAS)
def test_tied_gates_score_as_one_block(score):
    weight = torch.randn(3, 4, 5)
    together = combine_gates(block_scores(weight, (2, 1), score), score)
    stacked = weight.view(3, 2, 2, 5).transpose(0, 1).reshape(1, 12, 5)  # the same weights in blocks of 6 x 1
    torch.testing.assert_close(together, block_scores(stacked, (6, 1), score))


def test_unknown_score_is_refused():
    with pytest.raises(ValueError, match="score must be one of 'max', 'mean', 'l2', got 'min'"):
        block_scores(torch.ones(1, 1, 1), (1, 1), "min")
