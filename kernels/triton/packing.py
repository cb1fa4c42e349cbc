"""The weights of a time loop in the order in which the programs of resident.py load them.

The list of a gate slot's stored columns is cut into tiles of KO rows of LANES columns:

    weights [D, P, TILES, KO, R, LANES, 16]     columns [D, P, TILES, KO, R, LANES]     R = GROUPS * SLOTS

with LANES = 8 for float32 and 16 for narrower weights. The shortest lists are filled up with weights 0 of column H,
whose h is 0. Where all gates of a unit group have the same columns (`Pruner(tie_gates=True)`), they can share them:

    TIED (P = unit groups): weights [D, P, TILES, SLOTS, KO, LANES, 16]     columns [D, P, TILES, KO, LANES]

Picks are laid out in the same way, an entry of four vectors (row_blocks.py) in place of a column, and LANES = 2. Narrow
weights have their columns beside them; in float32 the columns of two tiles share a word, the second in its upper half:

    PICKED: float32    weights [D, P, TILES, KO, R, 2, 16, 4]     columns [D, P, ceil(TILES / 2), KO, R, 2, 16, 4]
            narrow     weights [D, P, TILES, KO, R, 2, 16, 4, 2]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from triton_sparse_rnn.kernels.triton.tiles import ResidentTile
from triton_sparse_rnn.sparse.row_blocks import UNITS, VECTORS, RowBlocks, of_one_kind, with_columns


def longest_list(blocks: RowBlocks) -> int:
    """The most stored columns that one gate of one unit group has, or vectors of picks."""
    entries = int(blocks.starts.diff().max()) if blocks.starts.numel() > 1 else 0
    return entries * (VECTORS if blocks.is_picked else 1)


def gates_are_tied(blocks: RowBlocks) -> bool:
    """Whether the gates of each unit group have the same columns, of blocks."""
    if blocks.is_picked:
        return False
    counts = blocks.starts.diff().view(-1, blocks.gates)
    if blocks.gates == 1 or not bool((counts == counts[:, :1]).all()):
        return False
    place, row = blocks.places()
    first_gate = row.div(blocks.gates, rounding_mode="floor") * blocks.gates
    return bool((blocks.columns == blocks.columns[blocks.starts[first_gate] + place]).all())


def chain_layers(recurrent: Sequence[RowBlocks], inputs: Sequence[RowBlocks]) -> RowBlocks:
    """Return the weights of layers of one direction as chains of a wavefront (resident.py): a gate for each slot.

    Args:
        recurrent: W_hh of each layer.
        inputs: W_ih of each layer but the first; its column j becomes H + 1 + j.
    """
    alike = of_one_kind([*recurrent, *inputs])
    parts = [(layer, blocks, 0) for layer, blocks in enumerate(alike[: len(recurrent)])]
    parts += [(layer, blocks, 1) for layer, blocks in enumerate(alike[len(recurrent) :], start=1)]
    G, H, groups = recurrent[0].gates, recurrent[0].hidden_size, recurrent[0].groups
    slots = 4 if G == 3 else G
    rows, columns = [], []
    for layer, blocks, is_input in parts:
        _, row = blocks.places()
        gate, group = row % G, row.div(G, rounding_mode="floor")
        slot = torch.where(gate == 2, 2 + is_input, gate) if G == 3 else gate  # a GRU keeps W_in x apart
        rows.append((layer * groups + group) * slots + slot)
        columns.append(blocks.columns + is_input * (H + 1))
    row, columns = torch.cat(rows), torch.cat(columns)
    order = torch.argsort(row, stable=True)
    counts = torch.bincount(row, minlength=len(recurrent) * groups * slots)
    values = torch.cat([blocks.weights for _, blocks, _ in parts])[order]
    return RowBlocks(
        values=with_columns(values, columns[order]) if alike[0].is_picked else values,
        columns=columns[order],
        starts=torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32),
        shape=(slots * H, 2 * H + 1),
        gates=slots,
        directions=len(recurrent),
    )


def pack_tiles(blocks: RowBlocks, tile: ResidentTile, tiles: int) -> tuple[Tensor, Tensor | None]:
    """Return weights and columns as at the top of the file.

    Args:
        blocks: the recurrent weight, all directions.
        tile: a row of the table.
        tiles: how many of them, enough for the longest list.
    """
    G, H, D = blocks.gates, blocks.hidden_size, blocks.directions
    programs = -(-blocks.groups // tile.groups)
    place, row = blocks.places()  # in its list, and which list
    t, ko, lane = (
        place.div(tile.tile_entries, rounding_mode="floor"),
        place.div(tile.lanes, rounding_mode="floor") % tile.ko,
        place % tile.lanes,
    )
    gate, group = row % G, row.div(G, rounding_mode="floor")
    d, group = group.div(blocks.groups, rounding_mode="floor"), group % blocks.groups
    p, slot = group.div(tile.groups, rounding_mode="floor"), group % tile.groups * tile.slots + gate
    slots = tile.groups * tile.slots
    if tile.tied:
        weights = blocks.values.new_zeros(D, programs, tiles, slots, tile.ko, tile.lanes, UNITS)
        weights[d, p, t, slot, ko, lane] = blocks.values
        columns = blocks.columns.new_full((D, programs, tiles, tile.ko, tile.lanes), H)
        columns[d, p, t, ko, lane] = blocks.columns
        return weights, columns
    shape, index = (D, programs, tiles, tile.ko, slots, tile.lanes), (d, p, t, ko, slot, lane)
    columns = blocks.columns.new_full((*shape, *blocks.columns.shape[1:]), H)
    columns[index] = blocks.columns
    weights = blocks.weights.new_zeros(*shape, *blocks.weights.shape[1:])
    weights[index] = blocks.weights
    if not tile.picked:
        return weights, columns
    if tile.itemsize < 4:
        return with_columns(weights, columns), None
    low, high = columns[:, :, ::2], columns[:, :, 1::2]
    low[:, :, : high.shape[2]] += high << 16
    return weights, low.contiguous()
