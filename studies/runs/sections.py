"""Runs taken together by task and number of steps, and within these by row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from studies.runs.records import Key
from studies.tasks import TASKS
from studies.tasks.task import Metric

OTHER = "other"  # family of rows that are no longer among those of a study
M = TypeVar("M")
Run = dict[str, Any]
Summarize = Callable[[Sequence[Run], Mapping[int, Run], Sequence[Metric]], Iterable[M]]


@dataclasses.dataclass(frozen=True)
class Section(Generic[M]):
    """All runs of a task with one number of steps.

    Attributes:
        models: what the study makes of the runs of each row.
    """

    task: str
    steps: int
    metrics: tuple[Metric, ...]
    models: list[M]
    runs: list[Run]

    @property
    def title(self) -> str:
        return f"{self.task}, {self.steps:,} steps"


def sections(
    runs: Mapping[Key, Run], rows: Sequence[str], summarize: Summarize[M], *, baseline: str
) -> list[Section[M]]:
    """Return a section for each task and number of steps.

    Args:
        rows: names of rows in their order; others follow.
        summarize: called with the runs of a row, those of the baseline by seed, and the task's metrics.
    """
    found = []
    for task, steps in sorted(
        {(key.task, key.steps) for key in runs}, key=lambda pair: ([*TASKS].index(pair[0]), pair[1])
    ):
        own = {key: run for key, run in runs.items() if (key.task, key.steps) == (task, steps)}
        base = {key.seed: run for key, run in own.items() if key.row == baseline}
        models: list[M] = []
        for name in dict.fromkeys([*rows, *(key.row for key in own)]):
            if group := [run for key, run in own.items() if key.row == name]:
                models += summarize(group, base, TASKS[task].metrics)
        found.append(Section(task, steps, TASKS[task].metrics, models, [*own.values()]))
    return found


def origin(runs: Iterable[Run]) -> str:
    """Say how long runs took, and on what."""
    runs = list(runs)
    machines, torches = sorted({run["processor"] for run in runs}), sorted({run["versions"]["torch"] for run in runs})
    minutes = sum(run["seconds"] for run in runs) / 60
    return f"{minutes:.0f} minutes on {', '.join(machines)}, torch {', '.join(torches)}."
