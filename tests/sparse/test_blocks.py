import itertools

import pytest
import torch

from triton_sparse_rnn.sparse.blocks import count_blocks, expand_block_mask, from_blocks, to_blocks

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
