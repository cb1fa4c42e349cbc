"""Run the grid of bench_grid.py part by part: `python -m bench.gpu.grid DIR [--seconds S]`.

All finished parts are in DIR/grid.json, which `python -m bench.report` reads; those that it holds already are skipped,
so a run that ended early goes on where it was. No part begins that would probably not end in time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.bench_grid import PARTS
from triton_sparse_rnn.atomic_files import write_atomically

SUITE = Path("bench") / "gpu" / "bench_grid.py"
PROJECT = Path(__file__).resolve().parents[2]
PART_SECONDS = 480  # in which a part must end
FIRST_GUESS_SECONDS = 240  # what a part takes, as long as none has been timed
FINISHED = (0, 1)  # exit codes of pytest: some rows may have failed


def run_grid(folder: Path, seconds: float, run_part: Callable[[str, Path, float], int]) -> int:
    """Run the missing parts, as many as fit into `seconds`.

    Args:
        folder: that holds, or gets, grid.json.
        seconds: for all of them.
        run_part: runs a part by its name, within a time, writes pytest-benchmark's JSON, returns pytest's exit code.
    Returns:
        0 if every part is there and no row of it failed, 3 if some parts are still missing, else 1.
    Raises:
        ValueError: grid.json is there and not ours.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "grid.json"
    grid = read_grid(path)
    end = time.monotonic() + seconds
    guess, broken = FIRST_GUESS_SECONDS, False
    for part in PARTS:
        left = end - time.monotonic()
        if part in grid["parts"]:
            print(f"{part}: is in {path}")
        elif left < guess:
            print(f"{part}: left for another run")
        else:
            begin = time.monotonic()
            result = folder / "part.json"
            status = run_part(part, result, min(left, PART_SECONDS))
            took = time.monotonic() - begin
            if status in FINISHED and _add(grid, part, result, status, took):
                write_atomically(path, [json.dumps(grid).encode()])
                guess = max(recorded["seconds"] for recorded in grid["parts"].values())
            else:
                broken = True
            result.unlink(missing_ok=True)
            print(f"{part}: exit status {status} after {took:.0f} s")
    if broken or any(recorded["status"] for recorded in grid["parts"].values()):
        return 1
    return 0 if len(grid["parts"]) == len(PARTS) else 3


def read_grid(path: Path) -> dict[str, Any]:
    """Return what grid.json holds: {"parts": {name: ...}, "benchmarks": [...]}."""
    if not path.exists():
        return {"parts": {}, "benchmarks": []}
    try:
        grid = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(grid["parts"], dict) and isinstance(grid["benchmarks"], list):
            return grid
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path} is not what an earlier run of bench.gpu.grid wrote; move it away")


def _add(grid: dict[str, Any], part: str, result: Path, status: int, seconds: float) -> bool:
    """Take over a part's rows, without the time of every single call; False if there are none."""
    try:
        found = json.loads(result.read_text(encoding="utf-8"))["benchmarks"]
    except (OSError, ValueError, KeyError):
        return False
    for row in found:
        row["stats"].pop("data", None)
    grid["benchmarks"] += found
    grid["parts"][part] = {"status": status, "seconds": seconds, "rows": len(found)}
    return bool(found)


def run_with_pytest(part: str, result: Path, seconds: float) -> int:
    """Run one part in a process of its own; its output goes where this process writes."""
    command = [sys.executable, "-m", "pytest", str(SUITE), "-q", "-m", "gpu", "-k", f"{part}-", "-W", "default"]
    command += ["--benchmark-max-time=0.1", "--benchmark-min-rounds=5", "--benchmark-disable-gc"]
    command += [f"--benchmark-json={result.resolve()}", "-p", "no:cacheprovider"]
    try:
        return subprocess.run(command, cwd=PROJECT, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return 124


def main(arguments: Sequence[str] | None = None) -> int:
    """Run parts until all are there or time is up."""
    import torch

    parser = argparse.ArgumentParser(prog="python -m bench.gpu.grid", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="that holds, or gets, grid.json")
    parser.add_argument("--seconds", type=float, default=520, help="to spend (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.gpu.grid: there is no CUDA device that torch can use", file=sys.stderr)
        return 2
    try:
        return run_grid(options.folder, options.seconds, run_with_pytest)
    except ValueError as error:
        print(f"bench.gpu.grid: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
