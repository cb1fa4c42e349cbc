"""What picks promise beyond being right: the bits of blocks, any number of units in a bank, the same bits always."""

import math

import pytest
import torch
from cpu_layers import MODES, RAGGED, Layer, assert_as_accurate_as_torch, random_matrix
from torch import Tensor

from triton_sparse_rnn.kernels.cpu.recurrent_layer import RecurrentLayer
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.layer_weights import LayerWeights
from triton_sparse_rnn.sparse.patterns import PatternLike
from triton_sparse_rnn.sparse.picks import BANKS, COLUMNS, Picks


def run_rnn(weight_ih: BlockMatrix, weight_hh: BlockMatrix, x: Tensor, B: int, *, quantized: bool = False) -> Tensor:
    """Return y of an RNN with relu and without biases."""
    layer = RecurrentLayer("RNN_RELU", [LayerWeights(weight_ih, weight_hh, None, None)], quantized=quantized)
    return layer(x, [torch.zeros(1, B, weight_hh.shape[1])], None)[0]


def stored_twice(weight: Tensor, *patterns: PatternLike, dtype: torch.dtype | None = None) -> list[BlockMatrix]:
    return [BlockMatrix.from_dense(weight, pattern, dtype=dtype) for pattern in patterns]


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("B", [1, 2, 7, 13])
def test_small_integers_are_multiplied_exactly(bank, B):
    """So all picks equal give the bits of blocks, however many units a bank has."""
    H, I = 40, 150
    weight = (
        torch.randint(-3, 4, (H, I)).float() * (torch.rand(-(-H // 16), 1, I) < 0.5).repeat(1, 16, 1).flatten(0, 1)[:H]
    )
    nothing, x = BlockMatrix.from_dense(torch.zeros(H, H), (16, 1)), torch.randint(-9, 10, (3 * B, I)).float()
    for columns in COLUMNS:
        picked = BlockMatrix.from_dense(weight, Picks(16, bank, columns))
        assert torch.equal(run_rnn(picked, nothing, x, B), (x @ weight.t()).relu())


@pytest.mark.parametrize("bank", BANKS)
def test_equal_picks_give_the_bits_of_blocks(bank):
    """With a unit in each bank, in which the order of the sums is that of blocks, for a row at a time."""
    H, banks = 48, 19
    weight = torch.zeros(H, banks * bank)
    for group in weight.split(16):
        stored = torch.arange(banks)[torch.rand(banks) < 0.9]
        places = stored * bank + torch.randint(0, bank, stored.shape)
        group[:, places] = torch.randn(16, len(places))
    nothing, x = BlockMatrix.from_dense(torch.zeros(H, H), (16, 1)), torch.randn(5, banks * bank)
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        blocks, picks = stored_twice(weight, (16, 1), Picks(16, bank), dtype=dtype)
        assert picks.nbytes > blocks.nbytes > 0
        assert torch.equal(run_rnn(blocks, nothing, x, 1), run_rnn(picks, nothing, x, 1))


@pytest.mark.parametrize("pattern", [Picks(16, 32), Picks(16, 64, 4), Picks(8, 8, 2), Picks(5, 16)], ids=str)
@pytest.mark.parametrize("B", [1, 3, 8])
def test_any_number_of_units_in_a_bank(pattern, B):
    """From none to all of them, in one row of blocks; in the others rows have more than each other, and are padded."""
    units, H = -(-pattern.bank // pattern.columns) + 1, 2 * pattern.rows + 3
    rank = torch.rand(H, units, pattern.bank).argsort(-1)
    counts = torch.rand(H, units).argsort(-1) * pattern.columns
    counts[: pattern.rows] = counts[0]
    stored = (rank < counts[:, :, None]).flatten(1)
    weight = torch.randint(1, 4, stored.shape).float() * stored
    nothing, x = BlockMatrix.from_dense(torch.zeros(H, H), (16, 1)), torch.randint(-9, 10, (B, stored.shape[1])).float()
    matrix = BlockMatrix.from_dense(weight, pattern)
    assert (matrix.starts.diff()[:4] > 0).all()  # entries of each size
    assert torch.equal(run_rnn(matrix, nothing, x, B), (x @ weight.t()).relu())


@pytest.mark.parametrize("pattern", [Picks(16, 32), Picks(16, 64, 4), Picks(7, 16)], ids=str)
@pytest.mark.parametrize("quantized", [False, True])
def test_same_bits_with_any_number_of_threads(pattern, quantized):
    layer = Layer("GRU", 300, 500, pattern, pattern, density=0.1, dtype=torch.int8 if quantized else None)
    inputs = layer.random_inputs([3] * 40)
    alone = layer.ready(quantized=quantized)(*inputs, None)
    for _ in range(3):
        assert all(map(torch.equal, layer.ready(quantized=quantized, num_threads=2)(*inputs, None), alone))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("B", [1, 2])
def test_only_who_picks_a_column_reads_it(value, B):
    """A padded place reads what its row reads anyway, or, of a row without a weight in the bank, what another does."""
    weight = torch.zeros(16, 64)
    weight[:, 3], weight[:8, 5], weight[2, 7], weight[9, 40] = 1.0, 2.0, 3.0, 4.0
    matrix = BlockMatrix.from_dense(weight, Picks(16, 32))
    readers = matrix.input_places()[:, 0]  # [NB, BR]
    nothing = BlockMatrix.from_dense(torch.zeros(16, 16), (16, 1))
    for column in range(64):
        x = torch.ones(B, 64)
        x[-1, column] = value
        y = run_rnn(matrix, nothing, x, B)
        reached = (readers == column).any(0)
        assert torch.equal(~y[-1].isfinite(), reached)
        assert (~reached | (weight[:, column] != 0) | (weight[:, 32:] == 0).all(1)).all()
        assert y[:-1].isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_blocks_and_picks_in_one_layer(mode):
    for patterns in ((Picks(16, 32), (16, 4)), ((5, 3), Picks(16, 16, 2)), (None, Picks(8, 8))):
        assert_as_accurate_as_torch(Layer(mode, 21, 70, *patterns), RAGGED)


def test_a_bank_wider_than_its_inputs_and_one_column():
    for I, H in ((1, 3), (5, 16), (31, 17)):
        assert_as_accurate_as_torch(Layer("LSTM", I, H, Picks(16, 64), Picks(16, 64)), [2, 1])


def test_random_zeros_are_padded():
    """Or the tests here and elsewhere would not meet a padded place."""
    matrix = random_matrix(2, 40, 70, Picks(16, 32))
    assert (matrix.values == 0).float().mean() > 0.1
