"""Run what is missing in a file, and show how it goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.gate_gradients.records import Key, append_run, key_of, read_runs
from bench.gate_gradients.rows import CALIBRATION_SEED, DENSE, Row
from bench.gate_gradients.training import calibrated_thresholds, settings, train
from bench.tasks import Task


def run_missing(
    task: Task, rows: Sequence[Row], path: Path, *, steps: int | None = None, console: Console | None = None
) -> None:
    """Run all rows with their seeds, but for those that the file holds, one thread each.

    Args:
        rows: the dense one first: thresholds are taken from its distribution.
        steps: None for the task's own.

    Raises:
        ValueError: the file is not ours, or holds a run of the same name with other settings.
        KeyboardInterrupt: Ctrl-C; the file holds all finished runs.
    """
    console = Console() if console is None else console
    steps = task.steps if steps is None else steps
    done = {key_of(run): run for run in read_runs(path)}
    plan = [(row, seed) for row in rows for seed in row.seeds]
    missing = []
    for row, seed in plan:
        key = Key(task.name, row.name, seed, steps)
        if key not in done:
            missing.append((row, seed))
        elif done[key]["settings"] != settings(task, row):
            raise ValueError(f"{path} holds a run of {row.name!r} with other settings; name another file")
    with _one_thread(), _bars(console, task, len(plan), len(plan) - len(missing), steps) as begin:
        for row, seed in missing:
            on_step, finish = begin(f"{row.name}, seed {seed}")
            thresholds = {}
            if row.quantile is not None:
                dense = done[Key(task.name, DENSE.name, CALIBRATION_SEED, steps)]
                thresholds = calibrated_thresholds(dense, task.loss_scale)
            run = train(task, row, seed, steps, thresholds=thresholds, on_step=on_step)
            append_run(path, run)
            done[key_of(run)] = run
            finish(run)


Begin = Callable[[str], tuple[Callable[[float], None], Callable[[dict[str, Any]], None]]]


@contextlib.contextmanager
def _bars(console: Console, task: Task, runs: int, done: int, steps: int) -> Iterator[Begin]:
    """Show a bar for all runs and one for the run under way; yields what begins a run.

    That returns what to call after each step, with its loss, and at the run's end, with its result.
    """
    columns = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console) as progress:
        all_runs = progress.add_task(f"{task.name}, runs", total=runs, completed=done, state="")
        current = progress.add_task("", total=steps, state="", visible=False)

        def begin(name: str) -> tuple[Callable[[float], None], Callable[[dict[str, Any]], None]]:
            progress.reset(current, description=name, visible=True, state="")

            def on_step(loss: float) -> None:
                progress.update(current, advance=1, state=f"loss {loss:.3f}")

            def finish(run: dict[str, Any]) -> None:
                progress.advance(all_runs)
                metric = task.metrics[0]
                quality = f"{metric.heading} {run['quality'][metric.key]:.{metric.digits}f}"
                progress.console.print(
                    f"{time.strftime('%H:%M:%S')}  {task.name}, {name}: {quality}, {run['seconds']:.0f} s",
                    highlight=False,
                    soft_wrap=True,
                )

            return on_step, finish

        yield begin


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
