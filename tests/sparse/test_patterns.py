import itertools
import math

import pytest
import torch

from triton_sparse_rnn.sparse.block_matrix import STORAGE_DTYPES, BlockMatrix
from triton_sparse_rnn.sparse.patterns import Blocks, as_pattern

SIZES = [(1, 1), (2, 3), (3, 1), (1, 4), (4, 2), (9, 9), (16, 1)]


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


def test_a_pair_is_blocks():
    assert as_pattern((8, 2)) == Blocks(8, 2)
    assert as_pattern(Blocks(8, 2)) == Blocks(8, 2)


@pytest.mark.parametrize("bad", [16, None, (16,), (16.0, 1), (True, 1), "16"])
def test_what_is_no_pattern_is_named(bad):
    with pytest.raises(TypeError, match=r"^storage must be two integers .*, as in Blocks"):
        as_pattern(bad, "storage")


def test_sizes_below_one():
    with pytest.raises(ValueError, match=r"^pattern must be at least \(1, 1\), got \(0, 1\)"):
        as_pattern((0, 1))
    with pytest.raises(ValueError, match=r"^rows and columns of Blocks must be at least \(1, 1\), got \(16, 0\)"):
        Blocks(16, 0)
    with pytest.raises(TypeError, match=r"^rows and columns of Blocks must be two integers .*, got \(16, 1\.5\)"):
        Blocks(16, 1.5)  # type: ignore[arg-type]
