"""What a step of a GRU on chip takes at least, by its machine code: an estimate, for GPUs that need not be here.

    python -m tools.estimate [--arch 90] [--markdown]

Nothing is run. For blocks and for picks, both balanced, with 90 % zeros, at batch 1:

    issue      warp instructions of a step, of all programs on one multiprocessor / 4, as its four schedulers each
               issue one a cycle; the shortest way through the time loop, which waits for nothing
    transfer   sectors of h that these programs read * 32 bytes / 64 bytes, which the L2 cache delivers to a
               multiprocessor in a cycle at most; sectors that 32 threads read at once count once
    exchange   530 cycles, in which a word that is written can be read by another multiprocessor: the least that is
               reported of the L2 cache; 0 for a program that holds a layer alone

A step takes at least as many cycles as the largest of the three. What it takes in truth is more: they add up in part,
programs are not in step, and barriers, shuffles and the cell are a chain of their own.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tools.machine_code import ARCHITECTURES, uncompilable
from tools.residency import TileCase, compile_tile, markdown, steps_in_loop
from triton_sparse_rnn.kernels.triton.packing import longest_list, pack_tiles
from triton_sparse_rnn.kernels.triton.tiles import H200, Residency, choose_residency
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.patterns import Blocks, Pattern
from triton_sparse_rnn.sparse.picks import Picks
from triton_sparse_rnn.sparse.row_blocks import RowBlocks, row_blocks
from triton_sparse_rnn.tables import align

SIZES = (512, 1024, 2048, 2560)
PATTERNS: tuple[Pattern, ...] = (Blocks(16, 1), Picks())
SPARSITY = 0.9
GATES = 3  # of a GRU
SCHEDULERS = 4  # of a multiprocessor
SECTOR_BYTES = 32
WORDS_OF_SECTOR = SECTOR_BYTES // 4
TRANSFER_BYTES = 64  # a cycle, from the L2 cache to a multiprocessor
EXCHANGE_CYCLES = 530
HEAD = (
    "H", "weights", "pattern", "tile", "registers", "instructions", "loads of h", "sectors", "barriers", "shuffles",
    "issue", "transfer", "exchange", "at least",
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """Of a step of one layer.

    Attributes:
        instructions, loads, barriers, shuffles: of a warp.
        sectors: of a program.
        programs: on the multiprocessor that has the most.
    """

    choice: Residency
    registers: int
    instructions: int
    loads: int
    barriers: int
    shuffles: int
    sectors: int
    programs: int

    @property
    def cycles(self) -> tuple[int, int, int]:
        """Of issue, transfer and exchange."""
        issued = self.programs * self.choice.tile.num_warps * self.instructions
        transferred = self.programs * self.sectors * SECTOR_BYTES
        exchange = EXCHANGE_CYCLES if self.choice.programs > 1 else 0
        return math.ceil(issued / SCHEDULERS), math.ceil(transferred / TRANSFER_BYTES), exchange

    def cells(self) -> list[str]:
        """As text, from the tile on."""
        choice, most = self.choice, max(self.cycles)
        programs = choice.programs * choice.directions * choice.resident_slices
        numbers = self.registers, self.instructions, self.loads, self.sectors, self.barriers, self.shuffles
        return [f"{programs} x {choice.tile.named(choice.tiles)}", *(f"{n:,}" for n in (*numbers, *self.cycles, most))]


def estimate(H: int, dtype: torch.dtype, pattern: Pattern, arch: int) -> Estimate | None:
    """Compile the kernel that a layer gets, and count; None if its weights do not stay on chip."""
    blocks = random_layer(H, dtype, pattern)
    choice = choose_residency("GRU", H, longest_list(blocks), dtype.itemsize, picked=blocks.is_picked, device=H200)
    if choice is None:
        return None
    case = TileCase(choice.tile, "GRU", str(dtype).removeprefix("torch."), arch)
    code = compile_tile(case, choice.tiles)
    steps = steps_in_loop(code, choice.tile)
    kinds = [opcode.partition(".")[0] for opcode in code.shortest]
    return Estimate(
        choice,
        registers=code.registers,
        instructions=len(kinds) // steps,
        loads=choice.tile.pack * choice.tiles,
        barriers=kinds.count("BAR") // steps,
        shuffles=kinds.count("SHFL") // steps,
        sectors=sectors(blocks, choice),
        programs=-(-choice.programs * choice.resident_slices // H200.sms),
    )


def random_layer(H: int, dtype: torch.dtype, pattern: Pattern) -> RowBlocks:
    """W_hh of a GRU with as many weights in each list, those of a random matrix that are largest."""
    weight = torch.randn(GATES, H, H, generator=torch.Generator().manual_seed(0))
    scores, all_kept = pattern.scores(weight, "l2"), pattern.kept(weight)
    masks = [
        pattern.prune_to_sparsity(of_gate, kept, SPARSITY, balanced=True)
        for of_gate, kept in zip(scores, all_kept, strict=True)
    ]
    weight *= pattern.spread(torch.stack(masks), weight)
    return row_blocks(BlockMatrix.from_dense(weight.flatten(0, 1), pattern, gates=GATES, dtype=dtype))


def sectors(blocks: RowBlocks, choice: Residency) -> int:
    """Of h at batch 1, that the program which reads the most reads in a step."""
    weights, columns = pack_tiles(blocks, choice.tile, choice.tiles)
    if columns is None:  # of narrow picks, beside them
        columns = weights[..., 1].view(torch.int16).int() & 0xFFFF
    if blocks.is_picked:
        if choice.tile.itemsize == 4:
            columns = torch.stack([columns & 0xFFFF, columns >> 16 & 0xFFFF], dim=3).flatten(2, 3)[:, :, : choice.tiles]
        columns = columns.movedim(-1, -3).flatten(-2)  # what the threads of a warp read at once lies side by side
    at_once = columns.div(WORDS_OF_SECTOR, rounding_mode="floor").sort(dim=-1).values
    distinct = 1 + (at_once.diff(dim=-1) != 0).sum(-1)
    return int(distinct.flatten(2).sum(-1).max())


def table(arch: int) -> list[list[str]]:
    """Cells of the table, its head first."""
    rows: list[list[str]] = [[*HEAD]]
    for H in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            for pattern in PATTERNS:
                found = estimate(H, dtype, pattern, arch)
                cells = ["streamed", *["-"] * (len(HEAD) - 4)] if found is None else found.cells()
                name = str(dtype).removeprefix("torch.")
                rows.append([f"{H:,}", name, "picks" if isinstance(pattern, Picks) else "blocks", *cells])
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.estimate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, default=90)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args(arguments)
    if reason := uncompilable():
        print(f"kernels cannot be compiled here: {reason}", file=sys.stderr)
        return 2
    print("An estimate from machine code, not a measurement. GRU, 90 % zeros, batch 1; registers of a thread,")
    print("instructions, loads, barriers and shuffles of a warp, sectors of a program; the rest in cycles of a step.\n")
    print("\n".join((markdown if options.markdown else align)(table(options.arch), right=range(4, len(HEAD)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
