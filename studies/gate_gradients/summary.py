"""Runs of one row taken together: means, and differences to the dense run of the same seed and steps."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from studies.gate_gradients.rows import DENSE, ROWS, Row
from studies.runs.records import Key
from studies.runs.spread import Spread
from studies.tasks import TASKS
from studies.tasks.task import Metric

OTHER = "other"  # family of rows that are no longer among ROWS
KNOWN = {row.name: row for row in ROWS}


class RowSummary(NamedTuple):
    """A row over all its seeds; shares from 0 to 1.

    Attributes:
        quality: by metric.
        minus_dense: by metric, of the seeds that have a dense run; None if there is no such seed.
        zeros: {gate: {"start", "middle", "end", "mean"}}, {} for a dense row.
        redundant: {"rnn", "model"}.
        thresholds: the different fixed ones, in units of the gradient of the summed loss.
    """

    name: str
    family: str
    label: str
    seeds: int
    quality: dict[str, Spread]
    minus_dense: dict[str, Spread | None]
    zeros: dict[str, dict[str, float]]
    redundant: dict[str, float]
    thresholds: tuple[float, ...]

    @property
    def mean_zeros(self) -> float:
        return statistics.fmean(shares["mean"] for shares in self.zeros.values()) if self.zeros else 0.0


class Section(NamedTuple):
    """All runs of a task with one number of steps."""

    task: str
    steps: int
    metrics: tuple[Metric, ...]
    rows: list[RowSummary]
    runs: list[dict[str, Any]]


def sections(runs: Mapping[Key, dict[str, Any]]) -> list[Section]:
    """Return a section for each task and number of steps, rows in the order of ROWS."""
    found = []
    for task, steps in sorted({(key.task, key.steps) for key in runs}):
        own = {key: run for key, run in runs.items() if (key.task, key.steps) == (task, steps)}
        dense = {key.seed: run for key, run in own.items() if key.row == DENSE.name}
        names = [*KNOWN, *(key.row for key in own)]
        grouped = {name: [run for key, run in own.items() if key.row == name] for name in dict.fromkeys(names)}
        rows = [_summarize(name, group, dense) for name, group in grouped.items() if group]
        found.append(Section(task, steps, TASKS[task].metrics, rows, list(own.values())))
    return found


def _summarize(name: str, runs: Sequence[dict[str, Any]], dense: Mapping[int, dict[str, Any]]) -> RowSummary:
    known, metrics = KNOWN.get(name, Row(name, OTHER, name)), runs[0]["quality"]
    quality = {metric: Spread.of(run["quality"][metric] for run in runs) for metric in metrics}
    paired = [(run["quality"], dense[run["seed"]]["quality"]) for run in runs if run["seed"] in dense]
    return RowSummary(
        name=name,
        family=known.family,
        label=known.label,
        seeds=len(runs),
        quality={metric: spread for metric, spread in quality.items() if spread},
        minus_dense={metric: Spread.of(own[metric] - other[metric] for own, other in paired) for metric in metrics},
        zeros={
            gate: {part: statistics.fmean(run["zeros"][gate][part] for run in runs) for part in parts}
            for gate, parts in runs[0]["zeros"].items()
        },
        redundant={what: statistics.fmean(run["redundant_macs"][what] for run in runs) for what in ("rnn", "model")},
        thresholds=tuple({run["gate_gradient"]["threshold"] for run in runs if "threshold" in run["gate_gradient"]}),
    )
