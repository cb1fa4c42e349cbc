from __future__ import annotations

import dataclasses

import pytest

from triton_sparse_rnn.kernels.triton.exchange import BETWEEN, NONE
from triton_sparse_rnn.kernels.triton.streamed import choose_streamed_tile
from triton_sparse_rnn.kernels.triton.tiles import (
    H200,
    SLOTS,
    TABLE,
    TARGETS,
    ResidentTile,
    choose_residency,
)

TILE = ResidentTile(slots=4, itemsize=4, groups=1, rows=1, num_warps=4, ko=2, tiles=4, registers=255)


@pytest.mark.parametrize("tile", TABLE, ids=str)
def test_rows_of_the_table_are_possible(tile: ResidentTile):
    assert tile.programs_per_sm(H200) >= 1
    slots = (1 if tile.tied else tile.slots) * tile.groups
    assert tile.pack * tile.num_warps == max(slots * tile.ko, tile.num_warps) * (4 if tile.picked else 1)
    assert tile.ahead is None or (tile.picked and tile.ahead < tile.tiles)
    assert not tile.tied or tile.groups == 1
    for power in (tile.groups, tile.rows, tile.num_warps, tile.ko, tile.lanes):
        assert power.bit_count() == 1


@pytest.mark.parametrize("picked", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 16, 128])
@pytest.mark.parametrize("mode", list(SLOTS))
@pytest.mark.parametrize("itemsize", [4, 2])
def test_choices_hold_the_layer_and_are_resident(mode: str, itemsize: int, batch_size: int, picked: bool):
    chosen = 0
    for H in (1, 16, 100, 256, 1024, 2560, 4096):
        for columns in {1, -(-H // 10), H}:
            choice = choose_residency(mode, H, columns, itemsize, directions=2, batch_size=batch_size, picked=picked)
            if choice is None:
                assert columns > 100 or batch_size * H > 4096
                continue
            chosen += 1
            tile = choice.tile
            assert tile.picked == picked
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


@pytest.mark.parametrize("picked", [False, True])
@pytest.mark.parametrize("mode", [NONE, BETWEEN])
def test_tiles_of_streamed_weights_hold_the_batch_or_are_the_largest(mode: int, picked: bool):
    tiles = [choose_streamed_tile(B, getattr(mode, "value", mode), picked=picked) for B in range(1, 100)]
    assert all(tile.rows >= B or tile.rows == tiles[-1].rows for B, tile in enumerate(tiles, 1))
    assert not any(tile.dot and (picked or mode is BETWEEN) for tile in tiles)
