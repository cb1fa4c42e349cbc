from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from gpu_layers import random_matrix

from triton_sparse_rnn.kernels.triton.packing import chain_layers, gates_are_tied, longest_list, pack_tiles
from triton_sparse_rnn.kernels.triton.tiles import ResidentTile
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.picks import Picks
from triton_sparse_rnn.sparse.row_blocks import RowBlocks, row_blocks, stack_directions

TILE = ResidentTile(slots=4, itemsize=4, groups=1, rows=1, num_warps=4, ko=2, tiles=4, registers=255)
PICKED = dataclasses.replace(TILE, picked=True)


def random_blocks(
    G: int, H: int, columns: int, *, D: int = 1, density: float = 0.3, dtype: torch.dtype = torch.float32,
    picked: bool = False,
) -> RowBlocks:  # fmt: skip
    pattern = Picks() if picked else (16, 1)
    return stack_directions([row_blocks(random_matrix(G, H, columns, pattern, density, dtype)) for _ in range(D)])


def dense(blocks: RowBlocks) -> torch.Tensor:
    """[D, groups, G, 16, columns], one stored column after another."""
    G = blocks.gates
    out = torch.zeros(blocks.directions * blocks.groups * G, 16, blocks.shape[1], dtype=blocks.values.dtype)
    if blocks.is_picked:
        out = torch.nn.functional.pad(out, (0, 1))  # what an entry is filled up with
    for row, (first, end) in enumerate(itertools.pairwise(blocks.starts.tolist())):
        for block in range(first, end):
            columns = blocks.columns[block].long()
            if blocks.is_picked:
                out[row].scatter_add_(1, columns, blocks.weights[block])
            else:
                out[row, :, columns] += blocks.values[block]
    out = out[..., : blocks.shape[1]]
    return out.reshape(blocks.directions, blocks.groups, G, 16, -1)


@pytest.mark.parametrize(
    ("G", "tile"),
    [
        (3, TILE),
        (4, dataclasses.replace(TILE, groups=4, ko=1)),
        (1, dataclasses.replace(TILE, slots=1)),
        (3, dataclasses.replace(TILE, itemsize=2)),
        (3, dataclasses.replace(TILE, tied=True)),
    ],
)
@pytest.mark.parametrize("H", [16, 37, 50])
def test_every_stored_weight_is_packed_once(G: int, tile: ResidentTile, H: int):
    torch.manual_seed(0)
    dtype = torch.float32 if tile.itemsize == 4 else torch.bfloat16
    blocks = random_blocks(G, H, H, D=2, dtype=dtype)
    if tile.tied:
        matrix = BlockMatrix.from_dense(torch.ones(H, H) * (torch.rand(H) < 0.3), (16, 1))
        matrix = BlockMatrix.from_dense(matrix.to_dense().repeat(G, 1) * torch.randn(G * H, 1), (16, 1), gates=G)
        blocks = row_blocks(matrix)
    tiles = -(-longest_list(blocks) // tile.tile_columns)
    weights, columns = pack_tiles(blocks, tile, tiles)
    assert columns is not None
    D, groups, programs = blocks.directions, blocks.groups, -(-blocks.groups // tile.groups)
    R = tile.groups * tile.slots
    assert weights.shape[:3] == columns.shape[:3] == (D, programs, tiles)
    if tile.tied:
        weights = weights.transpose(3, 4)  # as the others: [D, P, TILES, KO, R, LANES, 16]
        columns = columns.unsqueeze(4).expand(-1, -1, -1, -1, R, -1)
    assert weights.shape[3:] == (tile.ko, R, tile.lanes, 16)
    assert columns.shape[3:] == (tile.ko, R, tile.lanes)
    assert (weights[columns == H] == 0).all()
    assert ((columns >= 0) & (columns <= H)).all()
    found = torch.zeros(D, programs, R, 16, H + 1, dtype=dtype)
    by_slot = weights.movedim(4, 2).flatten(3, 5).transpose(3, 4)  # [D, P, R, 16, list]
    found.scatter_add_(4, columns.movedim(4, 2).flatten(3, 5).long().unsqueeze(3).expand_as(by_slot), by_slot)
    found = found.view(D, programs * tile.groups, tile.slots, 16, H + 1)
    assert torch.equal(found[:, :groups, :G, :, :H], dense(blocks))
    assert not found[:, groups:].any()
    assert not found[:, :, G:].any()


def test_tied_gates_are_seen():
    mask = (torch.rand(1, 1, 20) < 0.4).expand(3, 32, 20).reshape(96, 20)
    tied = row_blocks(BlockMatrix.from_dense(torch.randn(96, 20) * mask, (16, 1), gates=3))
    assert gates_are_tied(tied)
    columns = tied.columns.clone()
    columns[0] = next(c for c in range(20) if c not in columns[: int(tied.starts[1])])
    assert not gates_are_tied(tied._replace(columns=columns))
    assert not gates_are_tied(random_blocks(3, 32, 20))
    assert not gates_are_tied(random_blocks(1, 32, 20))


@pytest.mark.parametrize(
    ("G", "tile"),
    [
        (3, dataclasses.replace(PICKED, tiles=3)),
        (4, dataclasses.replace(PICKED, groups=4, ko=1)),
        (1, dataclasses.replace(PICKED, slots=1, ko=4)),
        (3, dataclasses.replace(PICKED, itemsize=2)),
    ],
)
@pytest.mark.parametrize("H", [16, 37, 50])
def test_every_pick_is_packed_once(G: int, tile: ResidentTile, H: int):
    torch.manual_seed(0)
    dtype = torch.float32 if tile.itemsize == 4 else torch.bfloat16
    blocks = random_blocks(G, H, H, D=2, dtype=dtype, picked=True)
    tiles = -(-longest_list(blocks) // tile.tile_columns)
    weights, columns = pack_tiles(blocks, tile, tiles)
    D, groups, programs, R = 2, blocks.groups, -(-blocks.groups // tile.groups), tile.groups * tile.slots
    shape = (D, programs, tiles, tile.ko, R, 2, 16, 4)
    if tile.itemsize == 2:
        assert columns is None
        assert weights.shape == (*shape, 2)
        weights, columns = weights[..., 0], weights[..., 1].view(torch.int16).int() & 0xFFFF
    else:
        assert columns is not None
        assert columns.shape == (D, programs, (tiles + 1) // 2, *shape[3:])
        halves = torch.stack([columns & 0xFFFF, columns >> 16 & 0xFFFF], dim=3)
        columns = halves.flatten(2, 3)[:, :, :tiles]
    assert weights.shape == columns.shape == shape
    assert (weights[columns == H] == 0).all()
    found = torch.zeros(D, programs, R, 16, H + 1, dtype=dtype)
    by_slot, places = (part.movedim((4, 6), (2, 3)).flatten(4) for part in (weights, columns))  # [D, P, R, 16, list]
    found.scatter_add_(4, places.long(), by_slot)
    found = found.view(D, programs * tile.groups, tile.slots, 16, H + 1)
    assert torch.equal(found[:, :groups, :G, :, :H], dense(blocks))
    assert not found[:, groups:].any()
    assert not found[:, :, G:].any()


@pytest.mark.parametrize("picked", [(), (0,), (0, 1, 2, 3, 4)], ids=["blocks", "one in picks", "picks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("G", [1, 3, 4])
def test_a_stack_has_the_columns_of_the_layer_below_behind_its_own(G: int, dtype: torch.dtype, picked: tuple[int, ...]):
    torch.manual_seed(0)
    H = 21
    parts = [random_blocks(G, H, H, dtype=dtype, picked=number in picked) for number in range(5)]
    recurrent, inputs = parts[:3], parts[3:]
    stack = chain_layers(recurrent, inputs)
    assert stack.is_picked == (len(picked) > 0)
    if picked and dtype == torch.float16:
        assert torch.equal(stack.values[..., 1].view(torch.int16).int(), stack.columns)
    slots = 4 if G == 3 else G
    assert (stack.gates, stack.directions, stack.hidden_size, stack.groups) == (slots, 3, H, 2)
    expected = torch.zeros(3, 2, slots, 16, 2 * H + 1, dtype=dtype)
    for layer in range(3):
        expected[layer, :, :G, :, :H] = dense(recurrent[layer])[0]
        if layer:
            expected[layer, :, [0, 1, 3] if G == 3 else list(range(G)), :, H + 1 :] = dense(inputs[layer - 1])[0]
    assert torch.equal(dense(stack), expected)
