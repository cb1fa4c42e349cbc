"""Random weights for the tests of Triton kernels, and how near their results are to those in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from gpu_device import DEVICE
from torch import Tensor

from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.blocks import count_blocks, expand_block_mask
from triton_sparse_rnn.sparse.picks import Picks


def random_matrix(
    gates: int,
    H: int,
    columns: int,
    pattern: tuple[int, int] | Picks = (16, 1),
    density: float = 0.4,
    dtype: torch.dtype = torch.float32,
) -> BlockMatrix:
    """A BlockMatrix [gates * H, columns] of about this density, with outputs of the size of a dense one's."""
    if isinstance(pattern, Picks):
        mask = torch.rand(gates * H, columns) < density
    else:
        kept = torch.rand(gates, *count_blocks(H, columns, pattern)) < density
        mask = expand_block_mask(kept, pattern, H, columns).flatten(0, 1)
    weight = torch.randn(gates * H, columns) * mask / max(1.0, columns * density) ** 0.5
    return BlockMatrix.from_dense(weight.to(DEVICE), pattern, gates=gates, dtype=dtype)


def in_columns_of_16(matrix: BlockMatrix) -> BlockMatrix:
    """The same weights as they are read: where one is not 0, so are the others of its column in the unit group.

    Picks are read as they are stored.
    """
    if matrix.is_picked:
        return matrix
    return BlockMatrix.from_dense(matrix.to_dense(), (16, 1), gates=matrix.gates)


def assert_close(ours: Sequence[Tensor], exact: Sequence[Tensor], tolerance: float = 3e-6) -> None:
    """NaN and infinity are to be where they are in `exact`; memory that nothing was written to holds NaN."""
    for our, right in zip(ours, exact, strict=True):
        torch.testing.assert_close(our.double(), right, rtol=tolerance, atol=tolerance, equal_nan=True)
