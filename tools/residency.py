"""What the machine code of the GPU kernels shows, for GPUs that need not be here.

    python -m tools.residency [--arch 90 ...] [--cells LSTM ...] [--markdown]

Every row of the tile table (tiles.py) is compiled for every cell, dtype and target, and the code is held against what
the kernels rely on; `problems` names what is broken, and the exit status is then 1. A second table says how large a
layer may be to stay on chip. Nothing is run and nothing is timed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from tools.machine_code import ARCHITECTURES, MachineCode, compile_for, uncompilable
from tools.sass import Access
from triton_sparse_rnn.kernels.triton.tiles import (
    H200,
    RESERVED_BYTES,
    SLOTS,
    TABLE,
    UNITS,
    ResidentTile,
    choose_residency,
)
from triton_sparse_rnn.tables import align

DTYPES = {4: ("float32",), 2: ("float16", "bfloat16")}  # by bytes of a weight
TRITON_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}  # of a multiprocessor
POINTERS = {
    "weights_ptr": "",
    "columns_ptr": "*i32",
    "sums_ptr": "*fp32",
    "bias_ptr": "*fp32",
    "h_in_ptr": "*fp32",
    "c_ptr": "*fp32",
    "exchange_ptr": "*i32",
    "y_ptr": "",
    "h_n_ptr": "*fp32",
    "starts_ptr": "*i64",
    "lengths_ptr": "*i32",
    "status_ptr": "*i32",
}  # of resident_steps; "" has the dtype of the weights
CELLS = ("RNN_TANH", "GRU", "LSTM")
INTEGERS = ("spin_limit", "first_slice", "first", "S", "T", "B", "H")


@dataclass(frozen=True)
class TileCase:
    """One line of the table: a tile of one cell and weight dtype, for one target."""

    tile: ResidentTile
    mode: str
    dtype: str
    arch: int

    def cells(self) -> list[str]:
        """As text."""
        return [self.tile.named(self.tile.most_tiles(self.arch)), self.mode, self.dtype, f"sm_{self.arch}"]


@dataclass(frozen=True)
class Finding:
    """A case, its machine code where the compiler gave one, and what is wrong with it."""

    case: TileCase
    code: MachineCode | None
    problems: tuple[str, ...]


def cases(architectures: Sequence[int] = ARCHITECTURES, cells: Sequence[str] = CELLS) -> Iterator[TileCase]:
    """Every row of the tile table, for every cell, dtype and target; an RNN's relu is a part of its tanh."""
    for tile in TABLE:
        for mode in cells:
            if SLOTS[mode] == tile.slots:
                for dtype in DTYPES[tile.itemsize]:
                    for arch in architectures:
                        yield TileCase(tile, mode, dtype, arch)


def variants(case: TileCase) -> dict[str, dict[str, bool]]:
    """Ways in which a tile is launched, each with constants of its own; the first is the one that the table shows.

    Float16 differs from bfloat16 in how weights are widened, and in nothing else; picks from blocks in what is asked of
    each word, and the way that takes most registers shows whether that fits.
    """
    ways: dict[str, dict[str, bool]] = {"": {}}
    if case.dtype == "float16":
        return ways
    ways["ragged"] = {"RAGGED": True}
    if case.tile.groups == 1 and not case.tile.tied:
        ways["wavefront"] = {"RAGGED": True, "WAVEFRONT": True}
    if case.tile.picked:
        *_, last = ways
        return {"": {}, last: ways[last]}
    return ways


def compile_tile(case: TileCase, tiles: int | None = None, **constants: bool) -> MachineCode:
    """Compile the kernel as it is launched for layers of that tile.

    Args:
        case: what to compile.
        tiles: that the layer needs; None for as many as fit.
        constants: RAGGED and WAVEFRONT of the kernel; False if not given.
    """
    from triton_sparse_rnn.kernels.triton.cells import CELLS
    from triton_sparse_rnn.kernels.triton.resident import resident_steps

    tile = case.tile
    tiles = tile.most_tiles(case.arch) if tiles is None else tiles
    flags = {"RAGGED": False, "WAVEFRONT": False} | constants
    absent = [] if flags["WAVEFRONT"] else ["bias_ptr"]
    absent += [] if flags["RAGGED"] else ["starts_ptr", "lengths_ptr"]
    absent += ["columns_ptr"] if tile.picked and tile.itemsize < 4 else []
    pointers = {name: kind or f"*{TRITON_DTYPES[case.dtype]}" for name, kind in POINTERS.items() if name not in absent}
    return compile_for(
        resident_steps,
        {**pointers, **dict.fromkeys(INTEGERS, "i32")},
        {
            **dict.fromkeys(absent),
            **flags,
            "CELL": CELLS[case.mode],
            "GROUPS": tile.groups,
            "TILES": tiles,
            "KO": tile.ko,
            "ROWS": tile.rows,
            "EXCHANGE": exchange_of(tile),
            "TIED": tile.tied,
            "PICKED": tile.picked,
            "AHEAD": min(tiles, tile.ahead or tiles),
            "PACK": tile.pack,
            "PORTABLE": False,
        },
        arch=case.arch,
        num_warps=tile.num_warps,
        maxnreg=tile.registers,
    )


def exchange_of(tile: ResidentTile) -> int:
    """How programs of a tile hand over h: a program of several unit groups holds a layer alone."""
    from triton_sparse_rnn.kernels.triton.exchange import BETWEEN, WITHIN

    return WITHIN.value if tile.groups > 1 else BETWEEN.value


def problems(code: MachineCode, tile: ResidentTile, words: int | None = None) -> list[str]:
    """Say what is wrong with the machine code of a tile: what the kernel's proof or its speed relies on and is not so.

    Args:
        code: of resident_steps.
        tile: the row of the table that it was compiled for.
        words: of the exchange that a thread reads in a step, where that is known.
    """
    found = []
    if code.spilled_bytes:
        often = code.count("LDL", "STL")
        found.append(f"spills {code.spilled_bytes} bytes a thread, with {often} loads and stores in the time loop")
    if code.registers > tile.registers:
        found.append(f"takes {code.registers} registers a thread, but the row of the table says {tile.registers}")
    programs = tile.programs_per_sm(H200)
    shared = programs * (code.shared_bytes + RESERVED_BYTES)
    if shared > SHARED_BYTES[code.arch]:
        found.append(f"{programs} programs take {shared} bytes of shared memory, more than a multiprocessor has")
    if asynchronous := [name for name in code.opcodes if name.startswith(("LDGSTS", "UBLKCP", "UTMALDG"))]:
        found.append(f"copies asynchronously: {_counted(asynchronous)}")
    if reloads := [access.opcode for access in _reloads(code, words)]:
        found.append(f"loads weights or columns inside the time loop: {_counted(reloads)}")
    if unknown := [a.opcode for a in code.accesses if not a.arguments]:
        found.append(f"addresses that come from no argument: {_counted(unknown)}")
    return found + _exchange_problems(code, between=tile.groups == 1)


def _reloads(code: MachineCode, words: int | None) -> list[Access]:
    """Accesses in the time loop that are, or may be, loads of weights or columns.

    Where an address may come from the exchange or from weights or columns (Triton 3.6 makes such code, in registers
    that held the others' addresses before the loop), counting decides: if no more words are read than a thread needs of
    the exchange, all of them are of the exchange.
    """
    loads = [a for a in code.accesses if a.in_time_loop and a.arguments & {"weights_ptr", "columns_ptr"}]
    of_exchange = [
        a
        for a in code.accesses
        if a.in_time_loop and not a.writes and "exchange_ptr" in a.arguments and a.opcode == "LDG.E"
    ]
    if words is not None and len(of_exchange) <= words:
        return [access for access in loads if access not in of_exchange]
    return loads


def _exchange_problems(code: MachineCode, *, between: bool) -> list[str]:
    """What breaks the handing over of h, between programs or within one."""
    found = []
    exchange = [access for access in code.accesses if "exchange_ptr" in access.arguments]
    for name, writes in (("reads", False), ("writes", True)):
        if not any(access.in_time_loop and access.writes == writes for access in exchange):
            found.append(f"nothing {name} the exchange inside the time loop")
    if between:
        weak = [a.opcode for a in code.accesses if a.arguments & {"exchange_ptr", "status_ptr"} and not a.strong]
        if weak:
            found.append(f"weak accesses to the exchange or the status: {_counted(weak)}")
    if constant := [access.opcode for access in exchange if ".CONSTANT" in access.opcode]:
        found.append(f"reads the exchange through a cache that is not kept up to date: {_counted(constant)}")
    return found


def examine(case: TileCase) -> Finding:
    """Compile a case in all variants and hold each against the rules."""
    codes, found = [], []
    for name, constants in variants(case).items():
        try:
            codes.append(compile_tile(case, **constants))
            words = case.tile.pack * case.tile.most_tiles(case.arch) * case.tile.rows
        except Exception as error:
            while error.__cause__:  # Triton's errors of a call hold the error of what was called
                error = error.__cause__
            return Finding(
                case, None, (f"{name or 'it'} does not compile: {type(error).__name__}: {str(error).strip()}",)
            )
        found += [f"{name}: {problem}" if name else problem for problem in problems(codes[-1], case.tile, words)]
    return Finding(case, codes[0], tuple(found))


def findings(table: Sequence[TileCase], processes: int | None = None) -> list[Finding]:
    """Examine cases, in processes of their own: Triton compiles on one core."""
    processes = min(processes or len(os.sched_getaffinity(0)), len(table))
    if processes <= 1:
        return [examine(case) for case in table]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(examine, table))


def code_table(results: Sequence[Finding]) -> list[list[str]]:
    """Cells of the table of machine code, its head first."""
    code_columns = ["registers", "spilled", "shared", "instructions", "barriers", "shuffles"]
    table = [["tile", "cell", "weights", "target", *code_columns]]
    for result in results:
        cells = result.case.cells()
        if code := result.code:
            steps = steps_in_loop(code, result.case.tile)
            a_step = [n // steps for n in (len(code.step), code.count("BAR"), code.count("SHFL"))]
            cells += [f"{n:,}" for n in (code.registers, code.spilled_bytes, code.shared_bytes, *a_step)]
        table.append(cells)
    return table


def steps_in_loop(code: MachineCode, tile: ResidentTile) -> int:
    """How many time steps the loop's body holds: more than one where the compiler has unrolled it."""
    published = sum(a.writes and a.in_time_loop and "exchange_ptr" in a.arguments for a in code.accesses)
    words = tile.groups * UNITS * tile.rows
    return max(1, published // max(1, words // (32 * tile.num_warps)))


def capacity_table(sparsity: float = 0.9, batch_size: int = 1) -> list[list[str]]:
    """Cells of the table of the largest layers that stay on chip, its head first."""
    table = [["cell", "weights", "pattern", "largest H, balanced mask", "largest H, unbalanced mask"]]
    for mode, (itemsize, dtypes), picked in itertools.product(SLOTS, DTYPES.items(), (False, True)):
        sizes = [
            largest_hidden_size(mode, itemsize, sparsity, batch_size, balanced=balanced, picked=picked)
            for balanced in (True, False)
        ]
        pattern = "picks" if picked else "blocks"
        table.append([mode, ", ".join(dtypes), pattern, *(f"{size:,}" if size else "none" for size in sizes)])
    return table


def largest_hidden_size(
    mode: str, itemsize: int, sparsity: float, batch_size: int = 1, *, balanced: bool, picked: bool = False
) -> int:
    """Return the largest H, a multiple of 16 under 65,536, whose recurrent weights stay on an H200; 0 if there is none.

    In a balanced mask every list of columns has H * density. In another their lengths vary as sums of H independent
    blocks do; the longest of n is then about sqrt(2 ln n) standard deviations longer than the mean. Balanced picks may
    be one vector more.
    """
    density = 1 - sparsity
    gates = 3 if mode == "GRU" else SLOTS[mode]
    for H in range(65_536 - UNITS, 0, -UNITS):
        lists = H // UNITS * gates
        longer = picked if balanced else math.sqrt(2 * math.log(lists) * H * density * sparsity)
        columns = min(H, math.ceil(H * density + longer))
        if choose_residency(mode, H, columns, itemsize, batch_size=batch_size, picked=picked):
            return H
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Print both tables; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.residency", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), help="an LSTM has most state")
    parser.add_argument("--markdown", action="store_true", help="print tables as Markdown")
    options = parser.parse_args(arguments)
    if reason := uncompilable():
        print(f"kernels cannot be compiled here: {reason}", file=sys.stderr)
        return 2
    results = findings(list(cases(options.arch, options.cells)))
    show = markdown if options.markdown else align
    print("Machine code: registers and spilled bytes of a thread, shared bytes of a program; in one time step,")
    print("instructions, barriers and shuffles (a waiting loop counted once).\n")
    print("\n".join(show(code_table(results), right=range(4, 10))))
    print(f"\nLargest layers with 90 % zeros that stay on chip, batch 1, {H200.sms} multiprocessors (H200):\n")
    print("\n".join(show(capacity_table(), right=(3, 4))))
    broken = [result for result in results if result.problems]
    for result in broken:
        for problem in result.problems:
            print(f"PROBLEM: {', '.join(result.case.cells())}: {problem}", file=sys.stderr)
    return 1 if broken else 0


def _counted(opcodes: Sequence[str]) -> str:
    return ", ".join(f"{count} {opcode}" for opcode, count in Counter(opcodes).items())


def markdown(table: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    """Lay out a table, its head first, as Markdown."""
    head, *body = table
    rule = ["---:" if i in right else "---" for i in range(len(head))]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *body)]


if __name__ == "__main__":
    sys.exit(main())
