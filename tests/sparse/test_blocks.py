import itertools

import numpy as np
import pytest
import torch

from triton_sparse_rnn.sparse.blocks import check_block_size, count_blocks, expand_block_mask, from_blocks, to_blocks

BLOCK_SIZES = list(itertools.product((1, 2, 3, 5), (1, 2, 4, 7)))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_blocks_hold_the_matrix_and_zeros(block_size):
    BR, BC = block_size
    for rows, columns in itertools.product((1, 4, 5, 6, 7), (1, 6, 7, 8)):  # every remainder of every size
        matrix = torch.rand(2, rows, columns) + 1
        blocks = to_blocks(matrix, block_size)
        assert blocks.shape == (2, *count_blocks(rows, columns, block_size), BR, BC)
        for i, j in itertools.product(*map(range, blocks.shape[1:3])):
            part = matrix[:, i * BR : (i + 1) * BR, j * BC : (j + 1) * BC]
            assert torch.equal(blocks[:, i, j, : part.shape[1], : part.shape[2]], part)
        assert blocks.count_nonzero() == matrix.numel()
        whole = from_blocks(blocks, rows, columns)
        assert whole.is_contiguous()
        assert torch.equal(whole, matrix)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_mask_of_blocks(block_size):
    mask = torch.rand(3, *count_blocks(7, 9, block_size)) < 0.5
    expanded = expand_block_mask(mask, block_size, 7, 9)
    assert expanded.shape == (3, 7, 9)
    assert torch.equal(to_blocks(expanded.byte(), block_size).flatten(-2).any(-1), mask)
    assert torch.equal(expanded.sum(), to_blocks(torch.ones(7, 9), block_size)[mask.nonzero()[:, 1:].unbind(1)].sum())


def test_block_size_is_returned_as_a_pair():
    assert check_block_size((3, 1)) == check_block_size([3, 1]) == check_block_size(torch.Size([3, 1])) == (3, 1)  # type: ignore[arg-type]
    assert repr(check_block_size((np.int64(3), np.uint8(1)))) == "(3, 1)"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bad", [16, None, "ab", (16,), (16, 1, 1), (16.0, 1), (True, 1), (np.True_, 1), (np.float32(16), 1), ("16", "1")]
)
def test_block_size_of_another_type(bad):
    with pytest.raises(TypeError, match="tile must be two integers"):
        check_block_size(bad, "tile")


@pytest.mark.parametrize("bad", [(0, 1), (1, 0), (-4, 4)])
def test_block_size_below_one(bad):
    with pytest.raises(ValueError, match="block_size must be at least"):
        check_block_size(bad)
