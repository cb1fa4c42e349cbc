"""Any block-sparse weight as blocks of 16 rows x 1 column of one gate, which is what all Triton kernels read.

    blocks of 8 x 2, H = 24                        the same weights as 16 x 1

    units  0-7   A A . .                           units  0-15   A A C C
    units  8-15  . . C C            ->                           0 0 C C
    units 16-23  . D D .      (say)                units 16-23   D D
                                                                 0 0

Where BR is no multiple of 16, rows of a 16 x 1 block that were not stored are filled up with zeros. These read their
input, as every weight of a 16 x 1 block does, and 0 times infinity is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from triton_sparse_rnn.sparse.block_matrix import BlockMatrix

UNITS = 16  # rows of a block: the hidden units of a unit group
_CHUNK = 2**20  # weights that are placed at a time


class RowBlocks(NamedTuple):
    """Blocks of 16 x 1 of one or more matrices [G * H, C] of one shape, in the order of sparse/block_matrix.py.

    Attributes:
        values: [NB, 16], float32, float16 or bfloat16.
        columns: [NB], int32, ascending within a row of blocks.
        starts: [D * ceil(H / 16) * G + 1], int32, where each row of blocks (direction, unit group, gate) begins.
        shape: (G * H, C).
        gates: G.
        directions: D, the number of matrices, one after another.
    """

    values: Tensor
    columns: Tensor
    starts: Tensor
    shape: tuple[int, int]
    gates: int
    directions: int = 1

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.shape[0] // self.gates

    @property
    def groups(self) -> int:
        """Unit groups of one matrix."""
        return -(-self.hidden_size // UNITS)


def row_blocks(matrix: BlockMatrix) -> RowBlocks:
    """Return the same weights, on the same device, as 16 x 1 blocks: all that hold a stored one.

    Blocks of 16 x BC are not copied where BC divides the columns of the matrix. Otherwise the temporary memory is 9
    bytes for 16 weights of the dense matrix, and a little more.

    Args:
        matrix: floating point, blocks of any size.

    >>> matrix = BlockMatrix.from_dense(torch.tensor([[1.0, 0.0], [2.0, 3.0]]), (1, 1))
    >>> blocks = row_blocks(matrix)
    >>> blocks.values[:, :2].tolist(), blocks.columns.tolist(), blocks.starts.tolist()
    ([[1.0, 2.0], [0.0, 3.0]], [0, 1], [0, 2])
    """
    assert matrix.values.is_floating_point()
    (BR, BC), columns = matrix.block_size, matrix.shape[1]
    if BR == UNITS and columns % BC == 0:
        within = torch.arange(BC, dtype=torch.int32, device=matrix.columns.device)
        return RowBlocks(
            values=matrix.values.view(-1, UNITS),
            columns=(matrix.columns[:, None] * BC + within).flatten() if BC > 1 else matrix.columns,
            starts=matrix.starts * BC if BC > 1 else matrix.starts,
            shape=matrix.shape,
            gates=matrix.gates,
        )
    return _regrouped(matrix)


def stack_directions(parts: Sequence[RowBlocks]) -> RowBlocks:
    """Return the matrices of several directions, of one shape and dtype, as one; a single one is returned as it is."""
    if len(parts) == 1:
        return parts[0]
    starts = [parts[0].starts[:1]]
    for part in parts:
        starts.append(starts[-1][-1] + part.starts[1:])
    return parts[0]._replace(
        values=torch.cat([part.values for part in parts]),
        columns=torch.cat([part.columns for part in parts]),
        starts=torch.cat(starts),
        directions=len(parts),
    )


def _regrouped(matrix: BlockMatrix) -> RowBlocks:
    """Place the stored weights of any blocks one by one."""
    G, H, C = matrix.gates, matrix.shape[0] // matrix.gates, matrix.shape[1]
    groups, device = -(-H // UNITS), matrix.values.device
    stored = torch.zeros(groups * G * C, dtype=torch.bool, device=device)
    for block, _, _ in _stored_weights(matrix):
        stored[block] = True
    places = stored.cumsum(0) - 1
    ends = stored.view(groups * G, C).sum(1).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
    values = matrix.values.new_zeros(int(starts[-1]), UNITS)
    for block, row, weights in _stored_weights(matrix):
        values[places[block], row] = weights
    return RowBlocks(
        values=values,
        columns=(stored.nonzero().flatten() % C if C else ends.new_zeros(0)).to(torch.int32),
        starts=starts,
        shape=matrix.shape,
        gates=G,
    )


def _stored_weights(matrix: BlockMatrix) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield stored weights, some at a time: block of 16 x 1 (unit group, gate, column), row in it, weight."""
    G, H, C = matrix.gates, matrix.shape[0] // matrix.gates, matrix.shape[1]
    (BR, BC), like = matrix.block_size, {"dtype": torch.int64, "device": matrix.values.device}
    block_rows = matrix.block_rows
    for first in range(0, len(matrix.values), max(1, _CHUNK // (BR * BC))):
        some = slice(first, first + max(1, _CHUNK // (BR * BC)))
        groups, gates = block_rows[some].div(G, rounding_mode="floor"), block_rows[some] % G
        units = groups[:, None, None] * BR + torch.arange(BR, **like)
        columns = matrix.columns[some, None, None].long() * BC + torch.arange(BC, **like)[:, None]
        blocks = (units.div(UNITS, rounding_mode="floor") * G + gates[:, None, None]) * C + columns
        exists = (units < H) & (columns < C)  # blocks at the edge are filled up
        rows = (units % UNITS).expand_as(exists)
        yield blocks[exists], rows[exists], matrix.values[some][exists]
