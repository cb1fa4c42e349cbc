"""Compile the kernels of many layers at once, in processes beside each other, so that a suite finds them in the cache.

    python -m bench.gpu.warm core       for bench_core.py; smoke is the other one

A suite that finds nothing there compiles by itself, one layer after another: nothing fails, but it takes minutes more.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import torch

from bench.gpu.contenders import Ours
from bench.record import ended_rows
from bench.workloads import Workload
from triton_sparse_rnn.doctor import usable_cores
from triton_sparse_rnn.kernels.triton import tiles

WORKERS = 12


Table = tuple[tiles.ResidentTile, ...]


class Job(NamedTuple):
    """A layer, and the tiles that it may have: none to read its weights at every step; None for those of tiles.py."""

    work: Workload
    table: Table | None = None


@contextlib.contextmanager
def only(table: Table | None) -> Iterator[None]:
    """Let layers that make their first call meanwhile choose among these tiles."""
    before = tiles.TABLE
    if table is not None:
        tiles.TABLE = table
    try:
        yield
    finally:
        tiles.TABLE = before


def workers(jobs: int) -> ProcessPoolExecutor:
    """Return processes for so many jobs; one core stays free."""
    count = max(1, min(WORKERS, usable_cores() - 1, jobs))
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def warm(jobs: Sequence[Job], pool: Executor) -> list[str | None]:
    """Run each layer once in another process; returns for each what went wrong, or None."""
    futures = [pool.submit(run_once, job) for job in jobs]
    errors: list[str | None] = []
    for future in futures:
        try:
            errors.append(future.result())
        except BrokenProcessPool as error:  # a process died; what it had begun is compiled when it is needed
            errors.append(repr(error))
    return errors


def run_once(job: Job) -> str | None:
    """Convert a layer and call it; returns what went wrong, or None."""
    torch.set_num_threads(1)
    try:
        with only(job.table):
            _, run, _ = Ours().prepare(job.work)
            run()
            if job.work.device == "cuda":
                torch.cuda.synchronize()
    except Exception as error:  # of any kind: it is only to be reported
        return repr(error)
    return None


def works_of(suite: str, record: Path | None = None) -> list[Workload]:
    """The layers of a suite as its contenders convert them.

    Args:
        suite: smoke or core.
        record: of pytest's --record: what only its rows need is left out.
    """
    from bench.gpu import bench_core, bench_smoke

    rows = bench_core.ROWS if suite == "core" else list(itertools.product(bench_smoke.SMOKE, bench_smoke.CONTENDERS))
    ended = {row["fullname"] for row in ended_rows(record)} if record is not None and record.exists() else set()
    works = [
        work if contender.zeros else work.without_zeros
        for work, contender in rows
        if isinstance(contender, Ours)
        if f"bench/gpu/bench_{suite}.py::bench_{suite}[{work}-{contender}]" not in ended
    ]
    return list(dict.fromkeys(works))


def main(arguments: Sequence[str] | None = None) -> int:
    """Warm up a suite."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.warm", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suite", choices=("smoke", "core"), help="whose kernels are compiled")
    parser.add_argument("--record", type=Path, metavar="FILE", help="leave out layers whose rows it holds")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.gpu.warm: there is no CUDA device that torch can use", file=sys.stderr)
        return 2
    begin = time.monotonic()
    jobs = [Job(work) for work in works_of(options.suite, options.record)]
    with workers(len(jobs)) as pool:
        for job, error in zip(jobs, warm(jobs, pool), strict=True):
            if error is not None:
                print(f"{job.work}: {error}")
    print(f"kernels of {len(jobs)} layers compiled in {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
