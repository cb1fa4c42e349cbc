"""Any stored weight in vectors of the 16 rows of a unit group and one gate, which is what all Triton kernels read.

Blocks become blocks of 16 rows x 1 column:

    blocks of 8 x 2, H = 24                        the same weights as 16 x 1

    units  0-7   A A . .                           units  0-15   A A C C
    units  8-15  . . C C            ->                           0 0 C C
    units 16-23  . D D .      (say)                units 16-23   D D
                                                                 0 0

Where BR is no multiple of 16, rows of a 16 x 1 block that were not stored are filled up with zeros. These read their
input, as every weight of a 16 x 1 block does, and 0 times infinity is NaN.

Picks become vectors in which each row has a column of its own. Four of them are an entry, so that a thread reads the
four weights of one row at once; the threads of a warp that hold a vector then read h within its bank. Beside a 16-bit
weight stands its column, in the upper half of the same 32-bit word. An entry is filled up with weights 0 of column C,
one behind the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from triton_sparse_rnn.sparse.block_matrix import BlockMatrix

UNITS = 16  # rows of a block: the hidden units of a unit group
VECTORS = 4  # of picks in an entry
MOST_PICKED_COLUMNS = 2**16 - 1  # that 16 bits beside a weight can tell from the one behind the last
_CHUNK = 2**20  # weights that are placed at a time


class RowBlocks(NamedTuple):
    """Entries of one or more matrices [G * H, C] of one shape: blocks of 16 x 1, or four vectors of picks.

    Attributes:
        values: [NB, 16], float32, float16 or bfloat16; of picks [NB, 16, 4] in float32, and [NB, 16, 4, 2] in the
            narrow dtypes, of which the first is the weight, and the bits of the second are its column.
        columns: [NB], int32, ascending within a row of blocks; of picks [NB, 16, 4].
        starts: [D * ceil(H / 16) * G + 1], int32, where each list of entries (direction, unit group, gate) begins.
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

    @property
    def is_picked(self) -> bool:
        """Whether each row has columns of its own."""
        return self.columns.dim() == 3

    def places(self) -> tuple[Tensor, Tensor]:
        """Of each entry, [NB], int64: its place in its list, and the list (direction, unit group, gate)."""
        counts = self.starts.diff()
        like = {"dtype": torch.int64, "device": counts.device}
        rows = torch.repeat_interleave(torch.arange(len(counts), **like), counts)
        return torch.arange(len(rows), **like) - self.starts[rows], rows

    @property
    def weights(self) -> Tensor:
        """The values alone: [NB, 16], or of picks [NB, 16, 4]."""
        return self.values[..., 0] if self.values.dim() == 4 else self.values


def row_blocks(matrix: BlockMatrix) -> RowBlocks:
    """Return the same weights, on the same device, as 16 x 1 blocks, all that hold a stored one; or as picks.

    Blocks of 16 x BC are not copied where BC divides the columns of the matrix. Otherwise the temporary memory is 9
    bytes for 16 weights of the dense matrix, and a little more.

    Args:
        matrix: floating point, blocks or picks of any size; picks of a narrow dtype with at most MOST_PICKED_COLUMNS.

    >>> matrix = BlockMatrix.from_dense(torch.tensor([[1.0, 0.0], [2.0, 3.0]]), (1, 1))
    >>> blocks = row_blocks(matrix)
    >>> blocks.values[:, :2].tolist(), blocks.columns.tolist(), blocks.starts.tolist()
    ([[1.0, 2.0], [0.0, 3.0]], [0, 1], [0, 2])
    """
    assert matrix.values.is_floating_point()
    if matrix.is_picked:
        return _entries_of_picks(matrix)
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
    parts = of_one_kind(parts)
    starts = [parts[0].starts[:1]]
    for part in parts:
        starts.append(starts[-1][-1] + part.starts[1:])
    return parts[0]._replace(
        values=torch.cat([part.values for part in parts]),
        columns=torch.cat([part.columns for part in parts]),
        starts=torch.cat(starts),
        directions=len(parts),
    )


def of_one_kind(parts: Sequence[RowBlocks]) -> list[RowBlocks]:
    """Return all as picks if one of them is: a block of 16 x 1 is a vector whose picks are the same."""
    if any(part.is_picked for part in parts):
        return [part if part.is_picked else _as_picks(part) for part in parts]
    return list(parts)


def _as_picks(blocks: RowBlocks) -> RowBlocks:
    counts = blocks.starts.diff()
    entries = (counts + VECTORS - 1).div(VECTORS, rounding_mode="floor")
    starts = torch.cat([blocks.starts[:1], entries.cumsum(0)]).to(torch.int32)
    number, row = blocks.places()
    entry, vector = starts[row] + number.div(VECTORS, rounding_mode="floor"), number % VECTORS
    values = blocks.values.new_zeros(int(starts[-1]), UNITS, VECTORS)
    columns = blocks.columns.new_full(values.shape, blocks.shape[1])
    values[entry, :, vector] = blocks.values
    columns[entry, :, vector] = blocks.columns[:, None]
    return blocks._replace(values=with_columns(values, columns), columns=columns, starts=starts)


def with_columns(weights: Tensor, columns: Tensor) -> Tensor:
    """Return `values` of picks: weights [NB, 16, 4], if narrow with their columns beside them."""
    if weights.element_size() == 4:
        return weights
    return torch.stack([weights, columns.to(torch.int16).view(weights.dtype)], dim=-1)  # the lower half, as unsigned


def _entries_of_picks(matrix: BlockMatrix) -> RowBlocks:
    """Give the n-th stored weight of each row of a unit group and gate a place in its n-th vector."""
    G, H, C = matrix.gates, matrix.shape[0] // matrix.gates, matrix.shape[1]
    groups, BR, block_rows = -(-H // UNITS), matrix.block_size[0], matrix.block_rows
    like = {"dtype": torch.int64, "device": matrix.values.device}
    unit = block_rows.div(G, rounding_mode="floor")[:, None] * BR + torch.arange(BR, **like)  # [NB, BR]
    row = (unit.div(UNITS, rounding_mode="floor") * G + (block_rows % G)[:, None]) * UNITS + unit % UNITS
    exists = (unit < H)[:, None].expand_as(matrix.values)  # rows at the edge are filled up
    row, weights, places = row[:, None].expand_as(exists)[exists], matrix.values[exists], matrix.input_places()[exists]
    order = row.argsort(stable=True)  # as stored within a row: bank by bank, so vectors keep to banks
    counts = torch.bincount(row, minlength=groups * G * UNITS)
    number = torch.empty_like(order)
    number[order] = torch.arange(len(order), **like) - (counts.cumsum(0) - counts)[row[order]]

    entries = -(-counts.view(-1, UNITS).amax(1) // VECTORS) if groups else counts
    starts = torch.cat([entries.new_zeros(1), entries.cumsum(0)])
    entry = starts[row.div(UNITS, rounding_mode="floor")] + number.div(VECTORS, rounding_mode="floor")
    values = weights.new_zeros(int(starts[-1]), UNITS, VECTORS)
    columns = places.new_full(values.shape, C)
    values[entry, row % UNITS, number % VECTORS] = weights
    columns[entry, row % UNITS, number % VECTORS] = places
    columns = columns.to(torch.int32)
    return RowBlocks(
        values=with_columns(values, columns),
        columns=columns,
        starts=starts.to(torch.int32),
        shape=matrix.shape,
        gates=G,
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
