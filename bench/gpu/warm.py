"""Compile the kernels of many layers at once, in processes beside each other, so that a suite finds them in the cache.

    python -m bench.gpu.warm            for bench_core.py

A suite that finds nothing there compiles by itself, one layer after another: nothing fails, but it takes minutes more.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import torch

from bench.gpu.contenders import Ours
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


def main() -> int:
    """Warm up the core suite."""
    from bench.gpu.bench_core import CORE

    if not torch.cuda.is_available():
        print("bench.gpu.warm: there is no CUDA device that torch can use", file=sys.stderr)
        return 2
    begin = time.monotonic()
    works = [work for pruned in CORE for work in (pruned, pruned.without_zeros)]
    jobs = [Job(work) for work in dict.fromkeys(works)]
    with workers(len(jobs)) as pool:
        for job, error in zip(jobs, warm(jobs, pool), strict=True):
            if error is not None:
                print(f"{job.work}: {error}")
    print(f"{len(jobs)} layers in {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
