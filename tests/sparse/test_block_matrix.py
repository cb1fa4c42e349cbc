import dataclasses
import itertools
from typing import Any

import pytest
import torch

from triton_sparse_rnn.sparse.block_matrix import STORAGE_DTYPES, BlockMatrix
from triton_sparse_rnn.sparse.blocks import count_blocks, expand_block_mask, to_blocks
from triton_sparse_rnn.sparse.patterns import Blocks, Pattern

BLOCK_SIZES = [(1, 1), (2, 1), (3, 2), (4, 5), (16, 1), (7, 16)]
OTHER_PATTERN = type("OtherPattern", (Pattern,), dict.fromkeys(Pattern.__abstractmethods__))()
FLOAT_DTYPES = [dtype for dtype in STORAGE_DTYPES if dtype.is_floating_point]


def make_weight(gates, H, columns, block_size, density=0.4, dtype=torch.float32):
    """[gates * H, columns] with whole blocks of zeros, and at least one block of each kind where there are two."""
    keep = torch.rand(gates, *count_blocks(H, columns, block_size)) < density
    keep.view(-1)[-1], keep.view(-1)[0] = False, True
    mask = expand_block_mask(keep, block_size, H, columns).flatten(0, 1)
    return torch.randn(gates * H, columns).masked_fill(~mask, 0).to(dtype)


def make_matrix(gates=2, H=5, columns=7, block_size=(2, 3), **options) -> BlockMatrix:
    weight = make_weight(gates, H, columns, block_size)
    return BlockMatrix.from_dense(weight, block_size, gates=gates, **options)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def test_layout_of_the_docstring():
    block = torch.ones(2, 2)
    letters = torch.tensor([[1, 0, 2], [0, 3, 0], [0, 4, 5], [0, 0, 0]])
    weight = torch.kron(letters, block) * torch.tensor([[1.0, 0.5]]).repeat(1, 3)
    matrix = BlockMatrix.from_dense(weight, (2, 2), gates=2)
    assert matrix.starts.tolist() == [0, 2, 4, 5, 5]
    assert matrix.columns.tolist() == [0, 2, 1, 2, 1]
    assert matrix.values[:, 0, 0].tolist() == [1, 2, 4, 5, 3]
    assert matrix.values[0].tolist() == [[1, 1], [0.5, 0.5]]  # column by column
    assert matrix.density == 5 / 12
    assert matrix.nbytes == 4 * (5 * 4 + 5 + 5)


@pytest.mark.parametrize("gates", [1, 3, 4])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_dense_and_back(block_size, gates):
    for H, columns in itertools.product((1, 5, 6, 7), (1, 4, 9)):
        weight = make_weight(gates, H, columns, block_size)
        matrix = BlockMatrix.from_dense(weight, block_size, gates=gates)
        matrix.check()
        assert same_bits(matrix.to_dense(), weight)
        assert matrix.block_size == block_size
        assert matrix.pattern == Blocks(*block_size)
        blocks = to_blocks(weight.view(gates, H, columns), block_size)
        assert len(matrix.values) == blocks.flatten(-2).any(-1).sum()


@pytest.mark.parametrize("gates", [1, 3, 4])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_torch_bsr_and_back(block_size, gates):
    BR, BC = block_size
    for H, columns in itertools.product((1, 5, 6), (1, 4, 9)):
        weight = make_weight(gates, H, columns, block_size)
        matrix = BlockMatrix.from_dense(weight, block_size, gates=gates)
        bsr = matrix.to_bsr()
        block_rows, block_columns = count_blocks(H, columns, block_size)
        padded = torch.zeros(gates, block_rows * BR, block_columns * BC)
        padded[:, :H, :columns] = weight.view(gates, H, columns)
        padded = padded.flatten(0, 1)
        assert torch.equal(bsr.to_dense(), padded)
        for source in (bsr, padded.to_sparse_bsr(block_size)):
            again = BlockMatrix.from_bsr(source, shape=(gates * H, columns), gates=gates)
            assert torch.equal(again.to_dense(), weight)
            assert same_bits(again.values, matrix.values)
            assert torch.equal(again.columns, matrix.columns)
            assert torch.equal(again.starts, matrix.starts)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("source", FLOAT_DTYPES)
def test_floating_point_storage(source, dtype):
    weight = make_weight(3, 5, 7, (2, 3), dtype=source)
    matrix = BlockMatrix.from_dense(weight, (2, 3), gates=3, dtype=dtype)
    assert matrix.values.dtype == dtype
    assert matrix.scales is None
    assert same_bits(matrix.to_dense(), weight.to(dtype))


@pytest.mark.parametrize("source", FLOAT_DTYPES)
def test_int8_storage_is_off_by_half_a_step_at_most(source):
    weight = make_weight(3, 5, 7, (2, 3), dtype=source)
    weight[2] *= 100
    matrix = BlockMatrix.from_dense(weight, (2, 3), gates=3, dtype=torch.int8)
    assert matrix.scales is not None
    assert matrix.scales.dtype == torch.float32
    assert (matrix.values.dtype, matrix.scales.shape) == (torch.int8, (15,))
    steps = weight.double().abs().amax(1) / 127
    errors = (matrix.to_dense().double() - weight.double()).abs()
    assert (errors <= steps[:, None] * (0.5 + 1e-4)).all()
    assert torch.equal(errors == 0, errors.masked_fill(weight == 0, 0) == 0)  # zeros stay zeros
    assert matrix.values.amin() >= -127
    assert torch.equal(matrix.to_bsr().to_dense().view(3, 6, 9)[:, :5, :7].reshape(15, 7), matrix.to_dense())


def test_int8_of_empty_tiny_and_huge_rows():
    weight = torch.zeros(4, 3)
    weight[1, 2], weight[2, 0] = -1e38, torch.finfo(torch.float32).tiny
    restored = BlockMatrix.from_dense(weight, (1, 1), dtype=torch.int8).to_dense()
    torch.testing.assert_close(restored, weight, rtol=1e-6, atol=1e-40)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-45])
def test_special_values_are_stored(value):
    weight = torch.zeros(4, 5)
    weight[3, 2] = value
    matrix = BlockMatrix.from_dense(weight, (2, 2))
    assert (len(matrix.values), matrix.columns.tolist()) == (1, [1])
    assert same_bits(matrix.to_dense(), weight)


def test_negative_zero_is_zero_but_is_kept_in_a_stored_block():
    weight = torch.tensor([[-0.0, -0.0, -0.0, 1.0]])
    matrix = BlockMatrix.from_dense(weight, (1, 2))
    assert len(matrix.values) == 1
    assert matrix.to_dense().signbit().tolist() == [[False, False, True, False]]


@pytest.mark.parametrize("density", [0, 1])
@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_no_blocks_and_all_blocks(dtype, density):
    weight = torch.full((6, 5), float(density))
    matrix = BlockMatrix.from_dense(weight, (2, 2), gates=3, dtype=dtype)
    matrix.check()
    assert matrix.density == density
    assert matrix.values.shape == (9 * density, 2, 2)
    assert torch.equal(matrix.to_dense().float(), weight)
    if density:
        assert torch.equal(matrix.to_bsr().to_dense()[:, :5].float(), weight)
    else:
        assert matrix.to_bsr().values().shape == (0, 2, 2)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_empty_matrices(shape):
    matrix = BlockMatrix.from_dense(torch.zeros(shape), (2, 3))
    matrix.check()
    assert matrix.to_dense().shape == shape
    assert matrix.density == 0


def test_any_strides_and_a_copy():
    weight = make_weight(3, 4, 6, (2, 2))
    strided = torch.nn.Parameter(weight.t().contiguous()).t()
    matrix = BlockMatrix.from_dense(strided, (2, 2), gates=3)
    assert not matrix.values.requires_grad
    assert torch.equal(matrix.to_dense(), weight)
    with torch.no_grad():
        strided.zero_()
    assert torch.equal(matrix.to_dense(), weight)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": [[1.0]]}, TypeError, "weight must be a tensor, got list"),
        ({"weight": torch.ones(3)}, ValueError, r"weight must be a floating-point matrix .* of shape \(3,\)"),
        ({"weight": torch.ones(3, 3, dtype=torch.int8)}, ValueError, "weight must be a floating-point .* torch.int8"),
        ({"weight": torch.ones(3, 3).to_sparse()}, ValueError, "weight must be .* got .* layout torch.sparse_coo"),
        ({"gates": 4}, ValueError, "gates must divide the 6 rows of the matrix, got 4"),
        ({"gates": 0}, ValueError, "gates must divide"),
        ({"gates": 2.0}, TypeError, "gates must be an integer, got 2.0"),
        ({"gates": True}, TypeError, "gates must be an integer"),
        ({"pattern": (0, 1)}, ValueError, "pattern must be at least"),
        ({"pattern": OTHER_PATTERN}, TypeError, "a BlockMatrix stores Blocks or Picks, got <"),
        ({"pattern": 16}, TypeError, "pattern must be two integers"),
        ({"dtype": torch.int32}, ValueError, "dtype must be one of torch.float32, .* got torch.int32"),
        ({"dtype": "int8"}, ValueError, "dtype must be one of"),
        ({"weight": torch.full((6, 5), 1e5), "dtype": torch.float16}, ValueError, "beyond 6.55e[+]04, the largest"),
        (
            {"weight": torch.full((6, 5), 1e39, dtype=torch.float64), "dtype": torch.float32},
            ValueError,
            "beyond 3.4e[+]38",
        ),
        ({"weight": torch.full((6, 5), float("nan")), "dtype": torch.int8}, ValueError, "int8 cannot store"),
    ],
)
def test_wrong_arguments_of_from_dense(arguments, error, message):
    options: dict[str, Any] = {"weight": torch.ones(6, 5), "pattern": (2, 2), **arguments}
    with pytest.raises(error, match=message):
        BlockMatrix.from_dense(**options)


def test_infinity_is_no_overflow():
    weight = torch.tensor([[float("inf"), -float("inf"), float("nan"), 2.0]])
    assert same_bits(BlockMatrix.from_dense(weight, (1, 2), dtype=torch.float16).to_dense(), weight.half())


def bsr(row_starts, columns, blocks, size):
    return torch.sparse_bsr_tensor(
        torch.tensor(row_starts), torch.tensor(columns), blocks, size=size, check_invariants=False
    )


@pytest.mark.parametrize(
    ("matrix", "options", "error", "message"),
    [
        (None, {}, TypeError, "matrix must be a tensor, got NoneType"),
        (torch.ones(4, 4), {}, ValueError, "matrix must have layout torch.sparse_bsr"),
        (torch.ones(4, 4).to_sparse(), {}, ValueError, "matrix must have layout torch.sparse_bsr"),
        (torch.ones(2, 4, 4).to_sparse_bsr((2, 2)), {}, ValueError, "no batch or dense axes"),
        (torch.ones(4, 4).to_sparse_bsr((2, 2)), {"shape": (4, 5)}, ValueError, r"shape \(4, 5\) .* fills up to"),
        (torch.ones(4, 4).to_sparse_bsr((2, 2)), {"shape": (3, 4), "gates": 2}, ValueError, "gates must divide"),
        (torch.ones(4, 4).to_sparse_bsr((2, 2)), {"gates": 4}, ValueError, r"fills up to \(8, 4\)"),
        (torch.ones(4, 4).to_sparse_bsr((2, 2)), {"gates": "2"}, TypeError, "gates must be an integer"),
        (torch.ones(4, 4, dtype=torch.int64).to_sparse_bsr((2, 2)), {}, ValueError, "values must be one of"),
        (
            torch.ones(4, 4, dtype=torch.int8).to_sparse_bsr((2, 2)),
            {},
            ValueError,
            "scales must not be None beside values of torch.int8",
        ),
        (bsr([0, 1, 2], [0, 7], torch.ones(2, 2, 2), (4, 4)), {}, ValueError, "not a valid BSR tensor"),
        (bsr([0, 2, 2], [1, 0], torch.ones(2, 2, 2), (4, 4)), {}, ValueError, "not a valid BSR tensor"),
        (bsr([0, 9, 2], [0, 1], torch.ones(2, 2, 2), (4, 4)), {}, ValueError, "not a valid BSR tensor"),
    ],
)
def test_wrong_arguments_of_from_bsr(matrix, options, error, message):
    with pytest.raises(error, match=message):
        BlockMatrix.from_bsr(matrix, **options)


def replace_item(tensor, index, value):
    return tensor.index_fill(0, torch.tensor([index % len(tensor)]), value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: {"columns": None}, "columns must not be None beside blocks"),
        (lambda m: {"columns": m.columns.long()}, "columns must be torch.int32"),
        (lambda m: {"starts": m.starts.float()}, "starts must be torch.int32"),
        (lambda m: {"values": m.values.int()}, "values must be one of"),
        (lambda m: {"values": m.values[0]}, "values must be blocks"),
        (lambda m: {"values": m.values[0, 0, 0]}, "values must be blocks"),
        (lambda m: {"values": m.values[:, :0]}, "values must be blocks"),
        (lambda m: {"values": m.values[:-1]}, "do not fit together"),
        (lambda m: {"values": m.values[:, :, :1].contiguous()}, "do not fit together"),
        (lambda m: {"columns": m.columns[:, None]}, "do not fit together"),
        (lambda m: {"columns": m.columns[:-1]}, "do not fit together"),
        (lambda m: {"starts": m.starts[:-1]}, "do not fit together"),
        (lambda m: {"starts": m.starts[:0]}, "do not fit together"),
        (lambda m: {"shape": (20, 7)}, "do not fit together"),
        (lambda m: {"starts": replace_item(m.starts, 0, 1)}, "starts must rise from 0"),
        (lambda m: {"starts": replace_item(m.starts, -1, 99)}, "starts must rise from 0"),
        (lambda m: {"starts": replace_item(m.starts, 2, 99)}, "starts must rise from 0"),
        (lambda m: {"starts": replace_item(m.starts, 2, -1)}, "starts must rise from 0"),
        (lambda m: {"columns": replace_item(m.columns, 0, -1)}, "columns must lie in 0..2"),
        (lambda m: {"columns": replace_item(m.columns, -1, 3)}, "columns must lie in 0..2"),
        (lambda m: {"columns": m.columns.flip(0)}, "columns must ascend"),
        (lambda m: {"columns": torch.zeros_like(m.columns)}, "columns must ascend"),
        (lambda m: {"shape": (10, 2)}, "columns must lie in 0..0"),
        (lambda m: {"values": m.values.transpose(1, 2).contiguous().transpose(1, 2)}, "must be contiguous"),
        (lambda m: {"starts": m.starts.to("meta")}, "starts must be .* on cpu, the device of values"),
        (lambda m: {"scales": torch.ones(10)}, "scales must be None beside values of torch.float32"),
        (lambda m: {"values": m.values.to(torch.int8)}, "scales must not be None beside values of torch.int8"),
        (
            lambda m: {"values": m.values.to(torch.int8), "scales": torch.ones(9)},
            r"scales must be torch.float32 of shape \(10,\), got",
        ),
        (
            lambda m: {"values": m.values.to(torch.int8), "scales": torch.ones(10).int()},
            r"scales must be torch.float32 of shape \(10,\), got",
        ),
    ],
)
def test_check_refuses_what_does_not_fit(change, message):
    weight = make_weight(2, 5, 7, (2, 3), density=1)
    matrix = BlockMatrix.from_dense(weight, (2, 3), gates=2)
    matrix.check()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(matrix, **change(matrix)).check()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((10, 7, 1), "shape must be two integers from 0"),
        ((10,), "shape must be two integers from 0"),
        ((10, -7), "shape must be two integers from 0"),
        ((-10, 7), "shape must be two integers from 0"),
        ((10, 7.0), "shape must be two integers from 0"),
        (("10", 7), "shape must be two integers from 0"),
        ((10, True), "shape must be two integers from 0"),
        ((10, None), "shape must be two integers from 0"),
        ((10, 2**31), r"shape must be two integers from 0 to 2147483647, .* got \(10, 2147483648\)"),
        ((10**30, 7), "shape must be two integers from 0"),
    ],
)
def test_check_refuses_what_is_no_shape(shape, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make_matrix(), shape=shape).check()


@pytest.mark.parametrize("block_size", [(4097, 1), (1, 4097), (10**9, 1), (1, 10**9), (10**9, 10**9)])
def test_blocks_far_beyond_their_matrix_are_refused(block_size):
    """None is stored, so that this takes no memory: the first call would."""
    BR, BC = block_size
    matrix = BlockMatrix(
        values=torch.empty(0, BC, BR),
        columns=torch.empty(0, dtype=torch.int32),
        starts=torch.zeros(3, dtype=torch.int32),
        shape=(10, 7),
        gates=2,
    )
    message = rf" must be at most \(4096, 4096\) for a matrix of 5 x 7, got \({BR}, {BC}\)"
    with pytest.raises(ValueError, match=f"blocks{message}"):
        matrix.check()
    with pytest.raises(ValueError, match=f"pattern{message}"):
        BlockMatrix.from_dense(torch.zeros(10, 7), block_size, gates=2)


def test_blocks_somewhat_beyond_their_matrix():
    for shape, block_size in (((7, 5), (16, 32)), ((7, 5), (4096, 1)), ((7, 5), (1, 4096)), ((5000, 2), (5000, 1))):
        weight = torch.eye(*shape)
        matrix = BlockMatrix.from_dense(weight, block_size)
        matrix.check()
        assert torch.equal(matrix.to_dense(), weight)


def test_check_takes_columns_that_fall_from_one_row_to_the_next():
    BlockMatrix.from_dense(torch.eye(6).flip(0), (2, 2)).check()
