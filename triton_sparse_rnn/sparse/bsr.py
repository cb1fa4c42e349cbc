"""Blocks of a torch BSR tensor, which stand gate after gate, in the order of a `BlockMatrix`, and back.

The tensor is [G * ceil(H / BR) * BR, ceil(columns / BC) * BC]: the blocks at the edge of each gate are filled up.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from triton_sparse_rnn.sparse.blocks import check_gates, count_blocks


def read_bsr(
    matrix: Tensor, shape: tuple[int, int] | None, gates: int
) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """Return blocks [NB, BR, BC], their block columns, the starts of rows of blocks, and (rows, columns).

    Arguments and errors are those of `BlockMatrix.from_bsr`.
    """
    if not isinstance(matrix, Tensor):
        raise TypeError(f"matrix must be a tensor, got {type(matrix).__name__}")
    if matrix.layout != torch.sparse_bsr or matrix.dim() != 2 or matrix.values().dim() != 3:
        raise ValueError(
            "matrix must have layout torch.sparse_bsr and no batch or dense axes, "
            f"got {matrix.layout} of shape {tuple(matrix.shape)}"
        )
    rows, columns = map(operator.index, matrix.shape if shape is None else shape)
    check_gates(gates, rows)
    matrix = matrix.detach()
    blocks, indices, starts = matrix.values(), matrix.col_indices(), matrix.crow_indices()
    block_size = (blocks.shape[1], blocks.shape[2])
    padded = _padded_shape(rows, columns, block_size, gates)
    if padded != tuple(matrix.shape):
        raise ValueError(
            f"shape {(rows, columns)} with gates={gates} fills up to {padded} in blocks of {block_size}, "
            f"but matrix has {tuple(matrix.shape)}"
        )
    own = {"dtype": blocks.dtype, "device": blocks.device}
    try:  # torch checks the indices of a BSR tensor only when it is told to
        torch.sparse_bsr_tensor(starts, indices, blocks, size=padded, **own, check_invariants=True)
    except RuntimeError as error:
        raise ValueError(f"matrix is not a valid BSR tensor: {error}") from error
    order, starts = _swapped(starts, len(blocks), (gates, padded[0] // gates // block_size[0]))
    return blocks[order], indices[order], starts, (rows, columns)


def make_bsr(blocks: Tensor, columns: Tensor, starts: Tensor, shape: tuple[int, int], gates: int) -> Tensor:
    """Undo `read_bsr`."""
    order, starts = _swapped(starts, len(blocks), ((len(starts) - 1) // gates, gates))
    return torch.sparse_bsr_tensor(
        starts,
        columns[order].long(),
        blocks[order],
        size=_padded_shape(*shape, (blocks.shape[1], blocks.shape[2]), gates),
        dtype=blocks.dtype,
        device=blocks.device,
        check_invariants=True,
    )


def rows_of_blocks(starts: Tensor, count: int) -> Tensor:
    """[count], int64, the row of blocks in which each stored block stands."""
    # Not repeat_interleave: however small, it starts threads, on which a process hangs that was forked later.
    return torch.searchsorted(starts, torch.arange(count, device=starts.device, dtype=starts.dtype), right=True) - 1


def starts_of(counts: Tensor) -> Tensor:
    """Where each row of blocks begins, and the last one ends, for the number of blocks in each."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _swapped(starts: Tensor, count: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The order of blocks, and the starts, when the grid in which rows of blocks stand is transposed."""
    counts = starts.diff().long()
    rows = torch.arange(len(counts), dtype=torch.int64, device=starts.device).view(grid).t()
    place = rows.flatten().argsort()[rows_of_blocks(starts, count)]
    return place.argsort(stable=True), starts_of(counts[rows.flatten()])


def _padded_shape(rows: int, columns: int, block_size: tuple[int, int], gates: int) -> tuple[int, int]:
    block_rows, block_columns = count_blocks(rows // gates, columns, block_size)
    return gates * block_rows * block_size[0], block_columns * block_size[1]
