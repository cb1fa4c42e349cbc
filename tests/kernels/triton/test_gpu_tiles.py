from __future__ import annotations

import dataclasses

import pytest
import torch

from triton_sparse_rnn.kernels.triton.exchange import BETWEEN, NONE
from triton_sparse_rnn.kernels.triton.streamed import choose_streamed_tile
from triton_sparse_rnn.kernels.triton.tiles import (
    H200,
    SLOTS,
    TABLE,
    TARGETS,
    ResidentTile,
    chain_layers,
    choose_residency,
    gates_are_tied,
    longest_list,
    pack_tiles,
)
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.row_blocks import RowBlocks, row_blocks, stack_directions

TILE = ResidentTile(slots=4, itemsize=4, groups=1, rows=1, num_warps=4, ko=2, tiles=4, registers=255)


def random_blocks(
    G: int, H: int, columns: int, *, D: int = 1, density: float = 0.3, dtype: torch.dtype = torch.float32
) -> RowBlocks:
    parts = []
    for _ in range(D):
        kept = torch.rand(G, -(-H // 16), 1, columns) < density
        mask = kept.expand(-1, -1, 16, -1).flatten(1, 2)[:, :H].flatten(0, 1)
        parts.append(
            row_blocks(BlockMatrix.from_dense(torch.randn(G * H, columns) * mask, (16, 1), gates=G, dtype=dtype))
        )
    return stack_directions(parts)


def dense(blocks: RowBlocks) -> torch.Tensor:
    """[D, groups, G, 16, columns], one stored column after another."""
    G, columns = blocks.gates, blocks.shape[1]
    out = torch.zeros(blocks.directions * blocks.groups * G, 16, columns, dtype=blocks.values.dtype)
    for row, (first, end) in enumerate(zip(blocks.starts.tolist(), blocks.starts[1:].tolist(), strict=False)):
        for block in range(first, end):
            out[row, :, blocks.columns[block]] += blocks.values[block]
    return out.view(blocks.directions, blocks.groups, G, 16, columns)


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


@pytest.mark.parametrize("G", [1, 3, 4])
def test_a_stack_has_the_columns_of_the_layer_below_behind_its_own(G: int):
    torch.manual_seed(0)
    H = 21
    recurrent = [random_blocks(G, H, H) for _ in range(3)]
    inputs = [random_blocks(G, H, H) for _ in range(2)]
    stack = chain_layers(recurrent, inputs)
    slots = 4 if G == 3 else G
    assert (stack.gates, stack.directions, stack.hidden_size, stack.groups) == (slots, 3, H, 2)
    expected = torch.zeros(3, 2, slots, 16, 2 * H + 1)
    for layer in range(3):
        expected[layer, :, :G, :, :H] = dense(recurrent[layer])[0]
        if layer:
            expected[layer, :, [0, 1, 3] if G == 3 else list(range(G)), :, H + 1 :] = dense(inputs[layer - 1])[0]
    assert torch.equal(dense(stack), expected)


@pytest.mark.parametrize("tile", TABLE, ids=str)
def test_rows_of_the_table_are_possible(tile: ResidentTile):
    assert tile.programs_per_sm(H200) >= 1
    slots = (1 if tile.tied else tile.slots) * tile.groups
    assert tile.pack * tile.num_warps == max(slots * tile.ko, tile.num_warps)
    assert not tile.tied or tile.groups == 1
    for power in (tile.groups, tile.rows, tile.num_warps, tile.ko, tile.lanes):
        assert power.bit_count() == 1


@pytest.mark.parametrize("batch_size", [1, 3, 16, 128])
@pytest.mark.parametrize("mode", list(SLOTS))
@pytest.mark.parametrize("itemsize", [4, 2])
def test_choices_hold_the_layer_and_are_resident(mode: str, itemsize: int, batch_size: int):
    chosen = 0
    for H in (1, 16, 100, 256, 1024, 2560, 4096):
        for columns in {1, -(-H // 10), H}:
            choice = choose_residency(mode, H, columns, itemsize, directions=2, batch_size=batch_size)
            if choice is None:
                assert columns > 100 or batch_size * H > 4096
                continue
            chosen += 1
            tile = choice.tile
            assert (choice.tiles - 1) * tile.tile_columns < columns <= choice.tiles * tile.tile_columns
            assert choice.programs * tile.groups * 16 >= H
            assert choice.slices * tile.rows >= batch_size
            if choice.programs > 1:
                programs = choice.programs * 2 * choice.resident_slices
                assert programs <= H200.sms * tile.programs_per_sm(H200)
    assert chosen >= 7


def test_a_layer_that_does_not_fit_is_streamed():
    assert choose_residency("GRU", 4096, 4096, 4) is None
    assert choose_residency("GRU", 1024, 100, 4, device=dataclasses.replace(H200, sms=8)) is None
    assert choose_residency("GRU", 1024, 100, 8) is None  # no such weights


def test_a_small_layer_is_held_by_one_program_unless_layers_wait_for_each_other():
    choice = choose_residency("GRU", 64, 20, 4, batch_size=300)
    assert choice is not None
    assert (choice.programs, choice.slices, choice.resident_slices) == (1, 300, 300)
    stacked = choose_residency("GRU", 64, 20, 4, directions=2, chains_wait=True)
    assert stacked is not None
    assert stacked.programs == 4
    assert stacked.tile.groups == 1


def test_fewer_tiles_fit_on_other_targets():
    tile = dataclasses.replace(TILE, tiles=5, elsewhere=(4, 3))
    assert [tile.most_tiles(target) for target in TARGETS] == [4, 5, 3]
    assert choose_residency("GRU", 2560, 312, 2) is not None
    assert choose_residency("GRU", 2560, 312, 2, device=dataclasses.replace(H200, target=100)) is None


def test_tied_gates_fit_where_others_do_not():
    assert choose_residency("GRU", 2560, 312, 4) is None
    tied = choose_residency("GRU", 2560, 312, 4, tied=True)
    assert tied is not None
    assert tied.tile.tied


@pytest.mark.parametrize("mode", [NONE, BETWEEN])
def test_tiles_of_streamed_weights_hold_the_batch_or_are_the_largest(mode: int):
    tiles = [choose_streamed_tile(B, getattr(mode, "value", mode)) for B in range(1, 100)]
    assert all(tile.rows >= B or tile.rows == tiles[-1].rows for B, tile in enumerate(tiles, 1))
    assert not any(tile.dot and mode is BETWEEN for tile in tiles)
