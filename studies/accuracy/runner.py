"""Run what is missing in a file, and show how it goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from studies.accuracy.rows import RECORDS, STEPS, Row
from studies.accuracy.training import model_path, settings, train
from studies.runs.progress import one_thread, run_bars
from studies.runs.records import Key
from studies.tasks import Task


def run_missing(
    task: Task,
    rows: Sequence[Row],
    path: Path,
    models: Path,
    *,
    steps: int | None = None,
    seeds: Sequence[int] | None = None,
    console: Console | None = None,
) -> None:
    """Run all rows with their seeds, but for those that the file holds, one thread each.

    Args:
        rows: the dense one first: some learn from it.
        models: a folder for the weights of every run.
        steps: None for those of STEPS, or else the task's own.
        seeds: None for each row's own.

    Raises:
        ValueError: the file is not ours, or holds a run of the same name with other settings; or the folder lacks the
            dense model of such a run.
        KeyboardInterrupt: Ctrl-C; the file holds all finished runs.
    """
    console = Console() if console is None else console
    steps = STEPS.get(task.name, task.steps) if steps is None else steps
    models.mkdir(parents=True, exist_ok=True)
    plan = {Key(task.name, row.name, seed, steps): row for row in rows for seed in (seeds or row.seeds)}
    missing = RECORDS.missing(path, {key: settings(task, row) for key, row in plan.items()})
    for key in plan.keys() - missing:
        if not model_path(models, key).exists():
            raise ValueError(
                f"{models} lacks the weights of {key.row!r}, seed {key.seed}, which {path} has as finished"
            )
    with one_thread(), run_bars(console, task.name, len(plan), len(plan) - len(missing)) as begin:
        for key in sorted(missing, key=lambda key: key.seed):  # the dense run of a seed comes before its others
            under_way = begin(f"{key.row}, seed {key.seed}", steps)
            run = train(task, plan[key], key.seed, steps, models, under_way.on_step)
            RECORDS.append(path, run)
            under_way.finish(_outcome(task, run))


def _outcome(task: Task, run: dict[str, Any]) -> str:
    metric = task.metrics[0]
    quality = f"{run['models'][0]['quality'][metric.key]:.{metric.digits}f}"
    return f"{metric.heading} {quality}, {run['parameters']:,} parameters, {run['seconds']:.0f} s"
