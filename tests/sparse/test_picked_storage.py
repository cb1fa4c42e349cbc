"""Picks in a BlockMatrix: any zeros, to and from dense, in the order that kernels read, and what `check` refuses."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from triton_sparse_rnn.ops.backends.reference import block_linear, dense_linear
from triton_sparse_rnn.sparse.block_matrix import STORAGE_DTYPES, BlockMatrix
from triton_sparse_rnn.sparse.blocks import to_blocks
from triton_sparse_rnn.sparse.picks import BANKS, ENTRY_UNITS, Picks

INF = float("inf")


def scattered(rows: int, columns: int, zeros: float) -> Tensor:
    torch.manual_seed(rows * 1000 + columns)
    return torch.randn(rows, columns) * (torch.rand(rows, columns) >= zeros)


@pytest.mark.parametrize("pattern", [Picks(), Picks(16, 64, 4), Picks(8, 8), Picks(3, 16, 2), Picks(1, 8, 4)], ids=str)
@pytest.mark.parametrize("zeros", [0, 0.5, 0.9, 1])
def test_any_zeros_of_any_shape_come_back(pattern, zeros):
    for H, C, G in itertools.product((1, 5, 16, 17), (1, 8, 31, 33, 70), (1, 3)):
        weight = scattered(G * H, C, zeros)
        matrix = BlockMatrix.from_dense(weight, pattern, gates=G)
        matrix.check()
        assert torch.equal(matrix.to_dense(), weight)
        assert matrix.pattern == pattern
        # As few units as the fullest row of each bank needs.
        most = to_blocks(weight.view(G, H, C), (pattern.rows, pattern.bank)).ne(0).sum(-1).amax(-1)
        assert len(matrix.values) == (-(-most // pattern.columns)).sum()


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("value", [1.0, float("nan"), -INF, 1e-45])
def test_each_dtype_holds_what_blocks_of_one_weight_hold(dtype, value):
    weight = scattered(2 * 18, 40, 0.8)
    if dtype != torch.int8:
        weight[3, 7] = value
    picked, single = (BlockMatrix.from_dense(weight, p, gates=2, dtype=dtype) for p in (Picks(), (1, 1)))
    torch.testing.assert_close(picked.to_dense(), single.to_dense(), rtol=0, atol=0, equal_nan=True)
    assert picked.values.dtype == dtype


def test_entries_of_one_count_follow_each_other():
    """The example of picked_storage.py: banks with 1, 6 and 4 units."""
    weight = torch.zeros(16, 96)
    for bank, count in enumerate((1, 6, 4)):
        weight[bank, bank * 32 + 20 : bank * 32 + 20 + count] = 1
    matrix = BlockMatrix.from_dense(weight, Picks())
    assert matrix.starts.tolist() == [0, 8, 8, 10, 11]
    assert matrix.columns.tolist() == [1] * 4 + [2] * 4 + [1] * 2 + [0]
    assert matrix.picks is not None
    assert matrix.picks[:4, 0, 1].tolist() == [20, 21, 22, 23]
    assert matrix.picks[8:10, 0, 1].tolist() == [24, 25]


def test_a_padded_place_reads_what_its_row_reads_or_else_one_column_of_the_fullest_row():
    weight = torch.zeros(3, 40)
    weight[0, [4, 9]], weight[1, 30], weight[1, 33] = 1, 1, 1
    matrix = BlockMatrix.from_dense(weight, Picks(3, 32))
    assert matrix.picks is not None
    assert matrix.picks[:, 0].tolist() == [[4, 30, 4], [9, 30, 4], [1, 1, 1]]
    x = torch.zeros(40, 40).fill_diagonal_(INF)
    linear = block_linear(matrix, None, torch.float32)
    reached = ~linear(x).isfinite()  # [column that is infinite, row]
    read = weight.ne(0).t()
    read[4, 2] = read[33, 0] = read[33, 2] = True  # rows without a weight in a bank in which others have some
    assert torch.equal(reached, read)


@pytest.mark.parametrize("pattern", [Picks(), Picks(16, 64, 4), Picks(5, 8, 2)], ids=str)
def test_the_product_unit_by_unit_is_that_of_the_dense_matrix(pattern):
    matrix = BlockMatrix.from_dense(scattered(3 * 21, 75, 0.7).double(), pattern, gates=3)
    x = torch.randn(4, 75, dtype=torch.float64)
    torch.testing.assert_close(*(make(matrix, None, torch.float64)(x) for make in (block_linear, dense_linear)))


def changed(matrix: BlockMatrix, **parts: object) -> BlockMatrix:
    return dataclasses.replace(matrix, **parts)  # type: ignore[arg-type]


def written(tensor: Tensor, place: object, value: int) -> Tensor:
    tensor = tensor.clone()
    tensor[place] = value  # type: ignore[index]
    return tensor


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: changed(m, picks=None), "picks must not be None beside picks"),
        (lambda m: changed(m, bank=None), "bank must not be None beside picks"),
        (lambda m: changed(m, picks=m.picks.int()), "picks must be torch.uint8 of shape"),
        (lambda m: changed(m, picks=m.picks[:-1]), "picks must be torch.uint8 of shape"),
        (lambda m: changed(m, picks=m.picks.transpose(1, 2)), "picks must be torch.uint8 of shape"),
        (lambda m: changed(m, picks=torch.cat([m.picks, m.picks], -1)[..., : m.picks.shape[-1]]), "must be contiguous"),
        (lambda m: changed(m, bank=m.bank.long()), "bank must be torch.int32 of shape"),
        (lambda m: changed(m, bank=torch.tensor([32, 32], dtype=torch.int32)), "bank must be torch.int32 of shape"),
        (lambda m: changed(m, bank=m.bank * 0), "bank must be one of"),
        (lambda m: changed(m, bank=m.bank * 8), "bank must be one of"),
        (lambda m: changed(m, bank=m.bank * 2), "columns must lie in|picks must"),
        (lambda m: changed(m, picks=written(m.picks, (0, 1, 0), 33)), "picks must be below 32"),
        (lambda m: changed(m, picks=written(m.picks, (0, 1, 0), 255)), "picks must be below 32"),
        (lambda m: changed(m, picks=written(m.picks, (m.columns == 2, 1), 31)), "name one of the 70 columns"),
        (lambda m: changed(m, picks=m.picks.flip(1)), "picks must ascend within a bank"),
        (lambda m: changed(m, columns=m.columns + 1), "columns must lie in 0..2, the banks of 32"),
        (lambda m: changed(m, columns=m.columns - 1), "columns must lie in 0..2, the banks of 32"),
        (lambda m: changed(m, columns=m.columns.flip(0)), "columns must ascend within each class"),
        (lambda m: changed(m, columns=written(m.columns, 0, 2)), "columns must ascend within each class"),
        (lambda m: changed(m, starts=written(m.starts, 1, int(m.starts[1]) - 1)), "starts must count whole entries"),
        (lambda m: changed(m, starts=m.starts[:-1]), "starts must be torch.int32 of shape"),
        (lambda m: changed(m, starts=m.starts[::ENTRY_UNITS]), "starts must be torch.int32 of shape"),
        (lambda m: changed(m, starts=m.starts + 1), "starts must rise from 0"),
    ],
)
def test_damage_is_refused(damage, message):
    weight = scattered(2 * 20, 70, 0.2)
    matrix = BlockMatrix.from_dense(weight, Picks(16, 32, 2), gates=2)
    matrix.check()
    with pytest.raises(ValueError, match=message):
        damage(matrix).check()


@pytest.mark.parametrize("starts", [[0, 0, 3, 5, 5], [0, 0, 0, 4, 5], [0, 4, 4, 4, 5]], ids=str)
def test_a_bank_has_as_few_entries_as_its_units_need(starts):
    """Here 5 units of one bank: in entries of 3 and 2, of 2, 2 and 1, or as it should be."""
    matrix = BlockMatrix.from_dense(torch.ones(2, 5), Picks(2, 8))
    other = changed(matrix, starts=torch.tensor(starts, dtype=torch.int32))
    if starts == matrix.starts.tolist():
        other.check()
        return
    with pytest.raises(ValueError, match="a bank must have entries of 4 units and one of those that are left"):
        other.check()


@pytest.mark.parametrize("units", [2, 5, 7, 9])
def test_picks_ascend_from_unit_to_unit_and_from_entry_to_entry(units):
    matrix = BlockMatrix.from_dense(torch.ones(2, units), Picks(2, 16))
    assert matrix.picks is not None
    for place in range(units - 1):
        order = [*range(place), place + 1, place, *range(place + 2, units)]
        with pytest.raises(ValueError, match="picks must ascend within a bank"):
            changed(matrix, picks=matrix.picks[order]).check()


def test_picks_beside_blocks_are_refused():
    blocks = BlockMatrix.from_dense(scattered(20, 70, 0.2), (16, 1))
    with pytest.raises(ValueError, match=r"starts must be|must not be None"):
        changed(blocks, picks=torch.zeros(len(blocks.values), 1, 16, dtype=torch.uint8)).check()


def test_there_is_no_bsr_form():
    with pytest.raises(ValueError, match="a BSR tensor holds blocks, and"):
        BlockMatrix.from_dense(scattered(20, 70, 0.2), Picks()).to_bsr()


def test_every_bank_of_picks_is_held():
    for bank in BANKS:
        assert BlockMatrix.from_dense(scattered(20, 70, 0.6), Picks(16, bank)).padded_columns == -(-70 // bank) * bank
