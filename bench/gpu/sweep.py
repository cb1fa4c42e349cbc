"""Try other tiles than the one that a layer gets: `python -m bench.gpu.sweep --out FILE [--seconds S]`.

Each line of JSON is one tile for one layer: its fields, the error of its result, and the median time of a call, by
events, replayed from a CUDA graph. A tile whose result is wrong is not timed; one that does not fit is left out, as is
one whose line FILE holds. Read it before changing TABLE in kernels/triton/tiles.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu.contenders import EVENT_SECONDS, Ours, all_cores
from bench.gpu.machine import has_faulted
from bench.gpu.timing import median_device_us, replayed
from bench.gpu.warm import WORKERS, Job, only, warm, workers
from bench.record import LEFT, append_line, lines_to_append_to
from bench.workloads import Workload
from triton_sparse_rnn.kernels.triton import tiles
from triton_sparse_rnn.kernels.triton.packing import gates_are_tied, longest_list
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.layer_config import GATES
from triton_sparse_rnn.sparse.picks import Picks
from triton_sparse_rnn.sparse.row_blocks import row_blocks

F32, BF16 = torch.float32, torch.bfloat16
AT_ONCE = 2 * WORKERS
LAYERS = [
    Workload(H=H, T=1000, B=B, sparsity=sparsity, dtype=dtype, device="cuda")
    for H, B, sparsity, dtype in (
        (1024, 1, 0.9, F32),
        (1024, 1, 0.9, BF16),
        (2560, 1, 0.9, BF16),
        (1024, 16, 0.9, BF16),
    )
]
LAYERS += [work.pruned_in(Picks()) for work in LAYERS]


def candidates(work: Workload) -> Iterator[tiles.ResidentTile]:
    """Yield tiles that hold the layer in programs of one unit group, those with few warps first."""
    weight = work.layer.get_parameter("weight_hh_l0")
    blocks = row_blocks(BlockMatrix.from_dense(weight, work.pattern, gates=GATES[work.cell]))
    longest, tied, slots = longest_list(blocks), gates_are_tied(blocks), tiles.SLOTS[work.cell]
    picked, aheads = blocks.is_picked, (None, 4) if blocks.is_picked else (None,)
    ways = itertools.product((2, 4, 8, 16), (1, 2, 4, 8), (1, 2, 4), {tied, False}, aheads)
    for num_warps, ko, rows, share, ahead in ways:
        tile = tiles.ResidentTile(
            slots=slots, itemsize=work.dtype.itemsize, rows=rows, num_warps=num_warps, ko=ko, tiles=1,
            registers=min(255, 65536 // (32 * num_warps)), tied=share, picked=picked, ahead=ahead,
        )  # fmt: skip
        tile = dataclasses.replace(tile, tiles=-(-longest // tile.tile_columns))
        bytes_of_weight = 4 if picked else tile.itemsize  # at least
        weights = slots * tile.columns * tiles.UNITS * bytes_of_weight // 4 // (32 * num_warps)  # registers of a thread
        if rows <= work.B and slots * ko >= num_warps and weights < tile.registers:
            with only((tile,)):
                fits = tiles.choose_residency(
                    work.cell, work.H, longest, tile.itemsize, batch_size=work.B, tied=tied, picked=picked
                )
            if fits is not None:
                yield tile


def try_tile(job: Job) -> dict[str, Any]:
    """Check and time a layer with a tile; returns what belongs into its line."""
    ours = Ours(graph=True)
    with only(job.table):
        expected, run, facts = ours.prepare(job.work)
        with torch.inference_mode():
            run = replayed(run)
            run().fill_(float("nan"))
            with all_cores():
                error = ours.error(run(), expected)
            return {**facts, "max_error": error, "device_us": median_device_us(run, EVENT_SECONDS)}


def sweep(layers: Sequence[Workload], out: Path, seconds: float) -> tuple[list[dict[str, Any]], int]:
    """Try the tile that each layer gets, then others, until time is up.

    A batch of tiles is compiled at once; nothing else runs while they are timed.

    Returns:
        The lines of `out`, those of earlier runs too, and how many tiles are left.
    Raises:
        OSError: `out` cannot be read or written.
        ValueError: it is not of this program.
    """
    end = time.monotonic() + seconds
    lines = lines_to_append_to(out, frozenset({"layer", "chosen", "streamed"}))
    jobs = [job for job in _jobs(layers) if not any(line.items() >= _named(job).items() for line in lines)]
    tried = 0
    with workers(len(jobs)) as pool:
        for first in range(0, len(jobs), AT_ONCE):
            if time.monotonic() > end:
                break
            batch = jobs[first : first + AT_ONCE]
            for job, error in zip(batch, warm(batch, pool), strict=True):
                if time.monotonic() > end:
                    break
                lines.append(_line(job, error))
                tried += 1
                append_line(out, lines[-1] | job.work.facts())
                if "error" in lines[-1] and has_faulted():
                    return lines, len(jobs) - tried
    return lines, len(jobs) - tried


def _jobs(layers: Sequence[Workload]) -> list[Job]:
    """The tiles that the layers get, then none at all, then others in a random order: time may not suffice for all."""
    others = [Job(work, (tile,)) for work in layers for tile in candidates(work)]
    random.Random(0).shuffle(others)
    return [*(Job(work) for work in layers), *(Job(work, ()) for work in layers), *others]


def _named(job: Job) -> dict[str, Any]:
    """What tells a job from others, as its line has it."""
    fields = dataclasses.asdict(job.table[0]) if job.table else {}
    chosen, streamed = job.table is None, job.table == ()
    return {"layer": str(job.work), "T": job.work.T, "chosen": chosen, "streamed": streamed, **fields}


def _line(job: Job, warm_error: str | None) -> dict[str, Any]:
    line = _named(job)
    try:
        return line | ({"error": warm_error} if warm_error else try_tile(job))
    except Exception as error:  # of any kind: the others are still to be tried
        return line | {"error": repr(error)}


def summary(lines: Sequence[dict[str, Any]]) -> str:
    """Return for each layer the chosen tile and the fastest three, in microseconds a step."""
    text = []
    for layer in dict.fromkeys(line["layer"] for line in lines):
        timed = [line for line in lines if line["layer"] == layer and "device_us" in line]
        failed = sum(line["layer"] == layer for line in lines) - len(timed)
        text.append(f"{layer}: {len(timed)} tiles timed, {failed} failed")
        fastest = sorted(timed, key=lambda line: line["device_us"])[:3]
        for line in [line for line in timed if line["chosen"] and line not in fastest] + fastest:
            mark = "chosen" if line["chosen"] else "      "
            text.append(f"  {mark} {line['device_us'] / line['T']:8.3f}  {line['tile']}")
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the summary."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.sweep", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines are added to it")
    parser.add_argument("--seconds", type=float, default=300, help="to spend (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.gpu.sweep: there is no CUDA device that torch can use", file=sys.stderr)
        return 2
    try:
        lines, left = sweep(LAYERS, options.out, options.seconds)
    except (OSError, ValueError) as error:
        print(f"bench.gpu.sweep: {error}", file=sys.stderr)
        return 2
    print(summary(lines))
    chosen = [line for line in lines if line["chosen"]]
    if not chosen or any("error" in line for line in chosen):
        return 1
    if left:
        print(f"{left} tiles were left for want of time")
    return LEFT if left else 0


if __name__ == "__main__":
    sys.exit(main())
