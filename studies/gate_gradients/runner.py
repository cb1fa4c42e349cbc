"""Run what is missing in a file, and show how it goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from studies.gate_gradients.rows import CALIBRATION_SEED, DENSE, RECORDS, Row
from studies.gate_gradients.training import calibrated_thresholds, settings, train
from studies.runs.progress import one_thread, run_bars
from studies.runs.records import Key, key_of
from studies.tasks import Task


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
    done = {key_of(run): run for run in RECORDS.read(path)}
    plan = {Key(task.name, row.name, seed, steps): row for row in rows for seed in row.seeds}
    missing = RECORDS.missing(path, {key: settings(task, row) for key, row in plan.items()})
    with one_thread(), run_bars(console, task.name, len(plan), len(plan) - len(missing)) as begin:
        for key in missing:
            row = plan[key]
            on_step, finish = begin(f"{key.row}, seed {key.seed}", steps)
            thresholds = {}
            if row.quantile is not None:
                dense = done[Key(task.name, DENSE.name, CALIBRATION_SEED, steps)]
                thresholds = calibrated_thresholds(dense, task.loss_scale)
            run = train(task, row, key.seed, steps, thresholds=thresholds, on_step=on_step)
            RECORDS.append(path, run)
            done[key_of(run)] = run
            finish(_outcome(task, run))


def _outcome(task: Task, run: dict[str, Any]) -> str:
    metric = task.metrics[0]
    return f"{metric.heading} {run['quality'][metric.key]:.{metric.digits}f}, {run['seconds']:.0f} s"
