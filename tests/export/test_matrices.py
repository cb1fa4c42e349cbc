"""Weights in the form of the C runtime: read back here, they are the same weights."""

import numpy as np
import pytest
import torch
from torch import Tensor

from triton_sparse_rnn import Blocks, Picks
from triton_sparse_rnn.export.matrices import BLOCKS, DENSE, PICKS, CMatrix, c_matrix
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix


def read_back(matrix: CMatrix) -> Tensor:
    """The matrix [gates * rows, columns], by the words of tsr_blob.h alone."""
    groups = -(-matrix.rows // 16)
    whole = torch.zeros(groups, matrix.gates, 16, -(-matrix.columns // 32) * 32)
    vectors = iter(matrix.values.float())
    places, words, counts = iter(matrix.places), iter(matrix.words), iter(matrix.counts)
    for row in whole.flatten(0, 1):
        if matrix.pattern == PICKS:
            for size in (4, 3, 2, 1):
                word = np.zeros(16, dtype=np.uint32)
                for entry in range(int(next(counts))):
                    word = next(words) if entry % (5 - size) == 0 else word
                    bank = int(next(places))
                    for _ in range(size):
                        columns = torch.from_numpy((word & 31).astype(np.int64)) + 32 * bank
                        row[torch.arange(16), columns] += next(vectors)
                        word = word >> np.uint32(5)
            continue
        for column in range(matrix.columns if matrix.pattern == DENSE else int(next(counts))):
            row[:, column if matrix.pattern == DENSE else int(next(places))] += next(vectors)
    assert all(next(rest, None) is None for rest in (vectors, places, words, counts))
    if len(matrix.scales):
        whole *= torch.from_numpy(matrix.scales)[..., None]
    assert not whole[..., matrix.columns :].any()
    return whole.transpose(0, 1).flatten(1, 2)[:, : matrix.rows, : matrix.columns].flatten(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize(
    ("pattern", "stored"),
    [
        (Picks(), (PICKS,)),
        (Picks(rows=4, bank=64, columns=2), (PICKS,)),
        (Blocks(16, 1), (BLOCKS,)),
        (Blocks(32, 3), (BLOCKS,)),
        (Blocks(7, 2), (BLOCKS, PICKS)),
    ],
    ids=str,
)
@pytest.mark.parametrize(("gates", "H", "columns"), [(1, 1, 1), (3, 21, 70), (4, 32, 33)])
def test_weights_come_back(pattern, stored, dtype, gates, H, columns):
    torch.manual_seed(0)
    weight = torch.randn(gates * H, columns) * (torch.rand(gates * H, columns) < 0.3)
    if isinstance(pattern, Blocks) and not (pattern.rows <= H and columns >= pattern.columns):
        pattern = Blocks(min(H, pattern.rows), min(columns, pattern.columns))
        stored = (BLOCKS, PICKS)
    matrix = BlockMatrix.from_dense(weight, pattern, gates=gates, dtype=dtype)
    ours = c_matrix(matrix, gates)
    assert ours.pattern in stored
    assert ours.values.dtype == dtype
    torch.testing.assert_close(read_back(ours), matrix.to_dense().float(), rtol=0, atol=0)


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("pattern", [Picks(), Blocks(16, 1)], ids=str)
def test_nothing_and_everything(pattern, density):
    weight = torch.randn(3 * 20, 40) * density
    assert torch.equal(read_back(c_matrix(BlockMatrix.from_dense(weight, pattern, gates=3), 3)), weight)


def test_a_dense_weight():
    weight = torch.randn(3 * 20, 7)
    ours = c_matrix(weight, 3)
    assert ours.pattern == DENSE
    assert len(ours.values) == 2 * 3 * 7
    assert torch.equal(read_back(ours), weight)


def test_single_weights_are_stored_in_what_is_smaller():
    torch.manual_seed(0)
    single = torch.randn(32, 256) * (torch.rand(32, 256) < 0.1)
    assert c_matrix(BlockMatrix.from_dense(single, (1, 1)), 1).pattern == PICKS
    rows = torch.randn(32, 256) * (torch.rand(2, 256) < 0.1).repeat_interleave(16, 0)
    assert c_matrix(BlockMatrix.from_dense(rows, (1, 1)), 1).pattern == BLOCKS
