"""Which tile a layer's time loop gets.

A program of `resident.py` holds a tile of weights in registers: for each gate slot of its unit groups, up to `columns`
columns of 16 weights. The list of a slot's stored columns is cut into tiles of KO rows of LANES columns (packing.py).
So a layer fits where its *longest* list fits: masks with as many blocks in every unit group and gate
(`Pruner(balanced=True)`) need fewer columns, and no program is slower than the others.

`choose_residency` is a plain function of the layer, the batch and the device; nothing is tried out. Registers were read
from machine code (tools/residency.py); no GPU has measured these rows yet.
"""

from __future__ import annotations

import dataclasses

from triton_sparse_rnn.sparse.row_blocks import UNITS, VECTORS

MOST_ROUNDS = 4  # launches one after another of slices that are not resident together, before streaming is chosen
TARGETS = (80, 90, 100)  # A100, H100 and H200, B200: those whose machine code was read
MOST_SLICES = 65535  # of a launch: they are the third axis of its grid
RESERVED_BYTES = 1024  # of shared memory, that each program takes besides its own
MOST_REGISTERS = 255  # that a thread may have
SLOTS = {"RNN_TANH": 1, "RNN_RELU": 1, "GRU": 4, "LSTM": 4}  # gate slots by nn.RNNBase.mode


@dataclasses.dataclass(frozen=True)
class Device:
    """What a choice depends on.

    Attributes:
        sms: streaming multiprocessors.
        target: the one of TARGETS that its compute capability comes after.
        registers: of one of them, 32 bits each.
        threads: of one of them.
    """

    sms: int
    target: int = 90
    registers: int = 65536
    threads: int = 2048

    def programs_per_sm(self, registers: int, num_warps: int) -> int:
        """How many programs are on a multiprocessor, by threads and registers: these are given out by 256 to a warp."""
        warp_registers = -(-registers * 32 // 256) * 256
        return min(self.registers // warp_registers // num_warps, self.threads // 32 // num_warps)


H200 = Device(sms=132)


@dataclasses.dataclass(frozen=True)
class ResidentTile:
    """A way to lay out programs; one row of the table.

    Attributes:
        slots: of the cell.
        itemsize: bytes of a weight.
        tied: gates share columns.
        picked: weights are picks.
        ahead: tiles whose words of h a thread asks for before it waits for the first; None for all.
        groups: unit groups of a program.
        rows: of the batch, of a program.
        num_warps: of a program.
        ko: rows of columns of a tile.
        tiles: the most that fit.
        registers: of a thread, at most, for any cell and target.
        elsewhere: tiles on sm_80 and sm_100, where fewer fit than on sm_90.
    """

    slots: int
    itemsize: int
    num_warps: int
    ko: int
    tiles: int
    registers: int
    groups: int = 1
    rows: int = 1
    tied: bool = False
    picked: bool = False
    ahead: int | None = None
    elsewhere: tuple[int, int] | None = None

    @property
    def lanes(self) -> int:
        """Entries side by side in a warp: 32 threads of 16 bytes, 16 weights a column, or 64 words of picks."""
        return 2 if self.picked else 32 * 16 // self.itemsize // UNITS

    @property
    def tile_entries(self) -> int:
        """Entries of a list in one tile."""
        return self.ko * self.lanes

    @property
    def tile_columns(self) -> int:
        """Weights of a row in one tile."""
        return self.tile_entries * (VECTORS if self.picked else 1)

    @property
    def columns(self) -> int:
        """Columns of a slot that fit, on sm_90."""
        return self.tiles * self.tile_columns

    def most_tiles(self, target: int = 90) -> int:
        """Tiles that fit on one of TARGETS."""
        return {80: self.elsewhere[0], 90: self.tiles, 100: self.elsewhere[1]}[target] if self.elsewhere else self.tiles

    @property
    def pack(self) -> int:
        """Words of h that a thread reads together, in one tile all that it needs."""
        slots = 1 if self.tied else self.slots
        return max(1, slots * self.groups * self.ko // self.num_warps) * (VECTORS if self.picked else 1)

    def programs_per_sm(self, device: Device) -> int:
        """How many are resident on a multiprocessor."""
        return device.programs_per_sm(self.registers, self.num_warps)

    def __str__(self) -> str:
        return self.named(self.tiles)

    def named(self, tiles: int) -> str:
        """Describe a program with so many tiles."""
        kind = ", tied" if self.tied else ", picks" if self.picked else ""
        columns = tiles * self.tile_columns
        rows = f" x {self.rows} rows" if self.rows > 1 else ""
        return f"{self.groups * UNITS} units x {columns} columns{rows}, {self.num_warps} warps{kind}"


# The best first. Many unit groups are for a program that holds a layer alone.
TABLE: tuple[ResidentTile, ...] = (
    ResidentTile(slots=4, itemsize=4, groups=2, num_warps=4, ko=1, tiles=8, registers=168),
    ResidentTile(slots=4, itemsize=4, groups=4, num_warps=4, ko=1, tiles=7, registers=255),
    ResidentTile(slots=4, itemsize=4, groups=8, num_warps=8, ko=1, tiles=7, registers=255),
    ResidentTile(slots=4, itemsize=4, groups=16, num_warps=8, ko=1, tiles=3, registers=255),
    ResidentTile(slots=4, itemsize=4, num_warps=4, ko=4, tiles=2, registers=96),
    ResidentTile(slots=4, itemsize=4, num_warps=4, ko=4, tiles=4, registers=168),
    ResidentTile(slots=4, itemsize=4, num_warps=4, ko=4, tiles=8, registers=255),
    ResidentTile(slots=4, itemsize=4, num_warps=8, ko=8, tiles=8, registers=255),
    ResidentTile(slots=4, itemsize=4, rows=2, num_warps=4, ko=4, tiles=7, registers=255),
    ResidentTile(slots=4, itemsize=4, rows=2, num_warps=8, ko=8, tiles=5, registers=255),
    ResidentTile(slots=4, itemsize=4, rows=4, num_warps=4, ko=4, tiles=6, registers=255, elsewhere=(6, 5)),
    ResidentTile(slots=4, itemsize=4, rows=4, num_warps=8, ko=8, tiles=6, registers=255, elsewhere=(6, 5)),
    ResidentTile(slots=4, itemsize=4, num_warps=4, ko=8, tiles=5, registers=255, tied=True),
    ResidentTile(slots=4, itemsize=2, groups=2, num_warps=4, ko=1, tiles=8, registers=168),
    ResidentTile(slots=4, itemsize=2, groups=4, num_warps=4, ko=1, tiles=6, registers=255),
    ResidentTile(slots=4, itemsize=2, groups=8, num_warps=8, ko=1, tiles=6, registers=255),
    ResidentTile(slots=4, itemsize=2, groups=16, num_warps=8, ko=1, tiles=2, registers=255),
    ResidentTile(slots=4, itemsize=2, num_warps=4, ko=4, tiles=1, registers=96),
    ResidentTile(slots=4, itemsize=2, num_warps=4, ko=4, tiles=2, registers=168),
    ResidentTile(slots=4, itemsize=2, num_warps=4, ko=4, tiles=5, registers=255, elsewhere=(4, 3)),
    ResidentTile(slots=4, itemsize=2, num_warps=8, ko=8, tiles=4, registers=255, elsewhere=(4, 3)),
    ResidentTile(slots=4, itemsize=2, rows=2, num_warps=4, ko=4, tiles=4, registers=255, elsewhere=(4, 2)),
    ResidentTile(slots=4, itemsize=2, rows=4, num_warps=4, ko=4, tiles=3, registers=255, elsewhere=(3, 2)),
    ResidentTile(slots=4, itemsize=2, rows=4, num_warps=8, ko=8, tiles=3, registers=255, elsewhere=(3, 2)),
    ResidentTile(slots=4, itemsize=2, num_warps=4, ko=4, tiles=6, registers=255, tied=True),
    ResidentTile(slots=1, itemsize=4, groups=4, num_warps=4, ko=1, tiles=8, registers=88),
    ResidentTile(slots=1, itemsize=4, groups=8, num_warps=4, ko=1, tiles=14, registers=255),
    ResidentTile(slots=1, itemsize=4, groups=16, num_warps=8, ko=1, tiles=14, registers=255),
    ResidentTile(slots=1, itemsize=4, num_warps=4, ko=16, tiles=2, registers=112),
    ResidentTile(slots=1, itemsize=4, num_warps=4, ko=16, tiles=6, registers=255),
    ResidentTile(slots=1, itemsize=4, rows=2, num_warps=4, ko=16, tiles=6, registers=255, elsewhere=(6, 5)),
    ResidentTile(slots=1, itemsize=4, rows=4, num_warps=4, ko=16, tiles=4, registers=255),
    ResidentTile(slots=1, itemsize=2, groups=4, num_warps=4, ko=1, tiles=4, registers=88),
    ResidentTile(slots=1, itemsize=2, groups=8, num_warps=4, ko=1, tiles=8, registers=200),
    ResidentTile(slots=1, itemsize=2, groups=16, num_warps=8, ko=1, tiles=8, registers=255),
    ResidentTile(slots=1, itemsize=2, num_warps=4, ko=16, tiles=1, registers=88),
    ResidentTile(slots=1, itemsize=2, num_warps=4, ko=16, tiles=3, registers=255),
    ResidentTile(slots=1, itemsize=2, rows=2, num_warps=4, ko=8, tiles=4, registers=255),
    ResidentTile(slots=1, itemsize=2, rows=4, num_warps=4, ko=8, tiles=3, registers=255, elsewhere=(3, 2)),
    # Picks: those first whose threads ask for all words of h before they wait.
    ResidentTile(slots=4, itemsize=4, groups=2, num_warps=4, ko=1, tiles=4, registers=168, picked=True),
    ResidentTile(slots=4, itemsize=4, groups=4, num_warps=8, ko=1, tiles=8, ahead=3, registers=255, picked=True),
    ResidentTile(slots=4, itemsize=4, groups=8, num_warps=8, ko=1, tiles=5, ahead=2, registers=255, picked=True),
    ResidentTile(slots=4, itemsize=4, groups=16, num_warps=8, ko=1, tiles=2, ahead=1, registers=255, picked=True),
    ResidentTile(slots=4, itemsize=4, num_warps=4, ko=1, tiles=4, registers=96, picked=True),
    ResidentTile(slots=4, itemsize=4, num_warps=4, ko=1, tiles=8, registers=168, picked=True),
    ResidentTile(slots=4, itemsize=4, num_warps=4, ko=1, tiles=16, registers=255, picked=True),
    ResidentTile(slots=4, itemsize=4, num_warps=8, ko=2, tiles=16, registers=255, picked=True),
    ResidentTile(slots=4, itemsize=4, num_warps=4, ko=1, tiles=26, ahead=4, registers=255, picked=True),
    ResidentTile(slots=4, itemsize=4, num_warps=8, ko=2, tiles=26, ahead=4, registers=255, picked=True),
    ResidentTile(slots=4, itemsize=4, rows=2, num_warps=4, ko=1, tiles=24, ahead=4, registers=255, picked=True),
    ResidentTile(slots=4, itemsize=4, rows=2, num_warps=8, ko=2, tiles=24, ahead=4, registers=255, picked=True),
    ResidentTile(slots=4, itemsize=4, rows=4, num_warps=4, ko=1, tiles=22, ahead=4, registers=255, picked=True),
    ResidentTile(slots=4, itemsize=4, rows=4, num_warps=8, ko=2, tiles=22, ahead=4, registers=255, picked=True),
    ResidentTile(slots=4, itemsize=2, groups=2, num_warps=4, ko=1, tiles=4, registers=168, picked=True),
    ResidentTile(slots=4, itemsize=2, groups=4, num_warps=8, ko=1, tiles=8, ahead=3, registers=255, picked=True),
    ResidentTile(slots=4, itemsize=2, groups=8, num_warps=8, ko=1, tiles=4, ahead=2, registers=255, picked=True),
    ResidentTile(slots=4, itemsize=2, groups=16, num_warps=8, ko=1, tiles=3, ahead=1, registers=255, picked=True),
    ResidentTile(slots=4, itemsize=2, num_warps=4, ko=1, tiles=4, registers=96, picked=True),
    ResidentTile(slots=4, itemsize=2, num_warps=4, ko=1, tiles=8, registers=168, picked=True),
    ResidentTile(slots=4, itemsize=2, num_warps=4, ko=1, tiles=16, registers=255, picked=True),
    ResidentTile(slots=4, itemsize=2, num_warps=8, ko=2, tiles=16, registers=255, picked=True),
    ResidentTile(
        slots=4, itemsize=2, num_warps=4, ko=1, tiles=33, ahead=4, registers=255, picked=True, elsewhere=(30, 33)
    ),
    ResidentTile(slots=4, itemsize=2, num_warps=8, ko=2, tiles=30, ahead=4, registers=255, picked=True),
    ResidentTile(slots=4, itemsize=2, rows=2, num_warps=4, ko=1, tiles=28, ahead=4, registers=255, picked=True),
    ResidentTile(slots=4, itemsize=2, rows=2, num_warps=8, ko=2, tiles=27, ahead=4, registers=255, picked=True),
    ResidentTile(slots=4, itemsize=2, rows=4, num_warps=4, ko=1, tiles=25, ahead=4, registers=255, picked=True),
    ResidentTile(slots=4, itemsize=2, rows=4, num_warps=8, ko=2, tiles=25, ahead=4, registers=255, picked=True),
    ResidentTile(slots=1, itemsize=4, groups=4, num_warps=4, ko=1, tiles=8, registers=168, picked=True),
    ResidentTile(slots=1, itemsize=4, groups=8, num_warps=4, ko=1, tiles=12, ahead=2, registers=255, picked=True),
    ResidentTile(slots=1, itemsize=4, groups=16, num_warps=8, ko=1, tiles=12, ahead=2, registers=255, picked=True),
    ResidentTile(slots=1, itemsize=4, num_warps=4, ko=4, tiles=4, registers=96, picked=True),
    ResidentTile(slots=1, itemsize=4, num_warps=4, ko=4, tiles=8, registers=168, picked=True),
    ResidentTile(slots=1, itemsize=4, num_warps=4, ko=4, tiles=16, registers=255, picked=True),
    ResidentTile(slots=1, itemsize=4, num_warps=4, ko=4, tiles=27, ahead=4, registers=255, picked=True),
    ResidentTile(slots=1, itemsize=4, rows=2, num_warps=4, ko=4, tiles=24, ahead=4, registers=255, picked=True),
    ResidentTile(slots=1, itemsize=4, rows=4, num_warps=4, ko=4, tiles=22, ahead=4, registers=255, picked=True),
    ResidentTile(slots=1, itemsize=2, groups=4, num_warps=4, ko=1, tiles=8, registers=168, picked=True),
    ResidentTile(slots=1, itemsize=2, groups=8, num_warps=4, ko=1, tiles=14, ahead=2, registers=255, picked=True),
    ResidentTile(slots=1, itemsize=2, groups=16, num_warps=8, ko=1, tiles=14, ahead=2, registers=255, picked=True),
    ResidentTile(slots=1, itemsize=2, num_warps=4, ko=4, tiles=4, registers=96, picked=True),
    ResidentTile(slots=1, itemsize=2, num_warps=4, ko=4, tiles=8, registers=168, picked=True),
    ResidentTile(slots=1, itemsize=2, num_warps=4, ko=4, tiles=16, registers=255, picked=True),
    ResidentTile(slots=1, itemsize=2, num_warps=4, ko=4, tiles=31, ahead=4, registers=255, picked=True),
    ResidentTile(slots=1, itemsize=2, rows=2, num_warps=4, ko=4, tiles=28, ahead=4, registers=255, picked=True),
    ResidentTile(slots=1, itemsize=2, rows=4, num_warps=4, ko=4, tiles=26, ahead=4, registers=255, picked=True),
)


@dataclasses.dataclass(frozen=True)
class Residency:
    """How one layer runs at one batch size with its weights on chip.

    Attributes:
        tile: the row of the table.
        tiles: of it that are used, no more than the longest list of columns needs.
        programs: P, of one direction and one slice of the batch.
        directions: D.
        slices: of the batch, `tile.rows` rows each.
        resident_slices: how many of them are on the device at a time; the others follow in launches of their own.
    """

    tile: ResidentTile
    tiles: int
    programs: int
    directions: int
    slices: int
    resident_slices: int

    @property
    def on_chip_bytes(self) -> int:
        """Registers that hold weights, at a time."""
        weights = self.tile.slots * self.tile.groups * self.tiles * self.tile.tile_columns * UNITS
        return weights * self.tile.itemsize * self.programs * self.directions * self.resident_slices


def choose_residency(
    mode: str,
    hidden_size: int,
    columns: int,
    itemsize: int,
    *,
    directions: int = 1,
    batch_size: int = 1,
    tied: bool = False,
    picked: bool = False,
    chains_wait: bool = False,
    device: Device = H200,
) -> Residency | None:
    """Return how to keep a layer's weights on chip, or None where they do not fit: they are then read at every step.

    Args:
        mode: nn.RNNBase.mode.
        hidden_size: H.
        columns: of the longest list: stored columns of one gate of one unit group, or vectors of picks.
        itemsize: bytes of a stored weight.
        directions: D, side by side.
        batch_size: B.
        tied: all gates of each unit group have the same columns.
        picked: weights are picks.
        chains_wait: directions are layers that wait for each other.
        device: where it runs.
    """
    groups = -(-hidden_size // UNITS)
    choices = []
    for tile in TABLE:
        alone = not chains_wait and (tile.groups > 1 or groups == 1)
        tiles = max(1, -(-columns // tile.tile_columns))
        if (tile.slots, tile.itemsize, tile.picked) != (SLOTS[mode], itemsize, picked) or tile.tied > tied:
            continue
        if tiles > tile.most_tiles(device.target):
            continue
        if tile.groups > 1 and (chains_wait or tile.groups < groups):
            continue
        programs = 1 if alone else groups
        slices = -(-batch_size // tile.rows)
        resident = device.sms * tile.programs_per_sm(device) // (programs * directions)
        resident = min(slices, MOST_SLICES if alone else resident)  # who waits for nobody may come later
        if slices > MOST_ROUNDS * resident:
            continue
        choice = Residency(tile, tiles, programs, directions, slices, resident)
        if resident == slices:
            return choice
        choices.append(choice)
    return min(choices, key=lambda choice: -(-choice.slices // choice.resident_slices), default=None)
