"""Cut a matrix into blocks and put it together again.

A block is BR rows by BC columns. Where BR or BC does not divide the matrix, the blocks at its edge are filled up with
zeros, so every function here takes every size that `check_filling_up` does. Leading axes are kept: a stacked weight
[G * H, I] is passed as [G, H, I], and no block then reaches over the border between two gates.
"""

from torch import Tensor
from torch.nn import functional as F

VECTOR_ROWS = 16  # of float32 in a vector of 512 bits: blocks of fewer rows leave part of it empty
ALWAYS_ALLOWED = 4096  # rows or columns of a block, however small the matrix is


def check_filling_up(
    block_size: tuple[int, int], rows: int, columns: int, where: str = "a matrix", name: str = "blocks"
) -> None:
    """Raise ValueError where the zeros that blocks are filled up with could take any amount of memory.

    A block may reach beyond the matrix [rows, columns], as layers of different sizes are given one block size, but be
    no higher than the larger of `rows` and ALWAYS_ALLOWED, and no wider than the larger of `columns` and that.
    """
    most = max(rows, ALWAYS_ALLOWED), max(columns, ALWAYS_ALLOWED)
    if block_size[0] > most[0] or block_size[1] > most[1]:
        raise ValueError(f"{name} must be at most {most} for {where} of {rows} x {columns}, got {block_size}")


def check_gates(gates: int, rows: int) -> None:
    """Raise TypeError or ValueError unless so many matrices can be stacked in so many rows."""
    if isinstance(gates, bool) or not isinstance(gates, int):
        raise TypeError(f"gates must be an integer, got {gates!r}")
    if gates < 1 or rows % gates:
        raise ValueError(f"gates must divide the {rows} rows of the matrix, got {gates}")


def count_blocks(rows: int, columns: int, block_size: tuple[int, int]) -> tuple[int, int]:
    """Return how many blocks stand below and beside each other, those at the edge included."""
    return -(-rows // block_size[0]), -(-columns // block_size[1])


def to_blocks(matrix: Tensor, block_size: tuple[int, int]) -> Tensor:
    """Cut [..., R, C] into [..., ceil(R / BR), ceil(C / BC), BR, BC], zeros beyond the edge.

    Raises:
        ValueError: see `check_filling_up`.

    >>> import torch
    >>> to_blocks(torch.arange(6).view(2, 3), (2, 2)).tolist()
    [[[[0, 1], [3, 4]], [[2, 0], [5, 0]]]]
    """
    (rows, columns), (BR, BC) = matrix.shape[-2:], block_size
    check_filling_up(block_size, rows, columns)
    block_rows, block_columns = count_blocks(rows, columns, block_size)
    if (block_rows * BR, block_columns * BC) != (rows, columns):
        matrix = F.pad(matrix, (0, block_columns * BC - columns, 0, block_rows * BR - rows))
    return matrix.unflatten(-1, (block_columns, BC)).unflatten(-3, (block_rows, BR)).transpose(-3, -2)


def from_blocks(blocks: Tensor, rows: int, columns: int) -> Tensor:
    """Undo `to_blocks`: [..., block rows, block columns, BR, BC] -> contiguous [..., rows, columns].

    >>> import torch
    >>> matrix = torch.arange(15).view(3, 5)
    >>> torch.equal(from_blocks(to_blocks(matrix, (2, 4)), 3, 5), matrix)
    True
    """
    whole = blocks.transpose(-3, -2).flatten(-2).flatten(-3, -2)
    return whole[..., :rows, :columns].contiguous()


def expand_block_mask(block_mask: Tensor, block_size: tuple[int, int], rows: int, columns: int) -> Tensor:
    """Turn one value per block [..., block rows, block columns] into one per weight [..., rows, columns]."""
    tall = block_mask.repeat_interleave(block_size[0], dim=-2)
    return tall.repeat_interleave(block_size[1], dim=-1)[..., :rows, :columns].contiguous()
