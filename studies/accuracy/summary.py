"""Runs of one row taken together: means, and differences to the dense run of the same seed and steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from studies.accuracy.rows import DENSE, ROWS, Row
from studies.runs.records import Key
from studies.runs.spread import Spread
from studies.tasks import TASKS
from studies.tasks.task import Metric

KNOWN = {row.name: row for row in ROWS}
OTHER = "other"  # family of rows that are no longer among ROWS
FLOAT32 = "float32"
Times = Mapping[Key, Mapping[str, Mapping[str, float]]]


class ModelSummary(NamedTuple):
    """A row in one weight dtype, over all its seeds.

    Attributes:
        quality: by metric.
        loss_percent: by how much the first metric is worse than the dense run's of the same seed, in % of it; None if
            there is no such seed.
        parameters, nbytes: of the whole model, those that are not zero, and of its file.
        us_per_step, torch_us_per_step: of its layer, by this package and by nn.GRU; None where it was not timed.
    """

    row: Row
    weight_dtype: str
    hidden_size: int
    sparsity: float
    quality: dict[str, Spread]
    loss_percent: Spread | None
    parameters: float
    nbytes: float
    us_per_step: float | None
    torch_us_per_step: float | None

    @property
    def name(self) -> str:
        return self.row.name + (f", {self.weight_dtype}" if self.weight_dtype != FLOAT32 else "")


class Section(NamedTuple):
    """All runs of a task with one number of steps."""

    task: str
    steps: int
    metrics: tuple[Metric, ...]
    models: list[ModelSummary]
    runs: list[dict[str, Any]]

    def model(self, row: Row) -> ModelSummary | None:
        """Return a row's model in float32, None if there is none."""
        return next((model for model in self.models if model.row is row and model.weight_dtype == FLOAT32), None)


def sections(runs: Mapping[Key, dict[str, Any]], times: Times | None = None) -> list[Section]:
    """Return a section for each task and number of steps, rows in the order of ROWS."""
    found = []
    for task, steps in dict.fromkeys((name, key.steps) for name in TASKS for key in runs if key.task == name):
        own = {key: run for key, run in runs.items() if (key.task, key.steps) == (task, steps)}
        dense = {key.seed: run for key, run in own.items() if key.row == DENSE.name}
        models = []
        for name in dict.fromkeys([*KNOWN, *(key.row for key in own)]):
            of_row = {key: run for key, run in own.items() if key.row == name}
            for number in range(len(next(iter(of_row.values()))["models"]) if of_row else 0):
                models.append(_summarize(TASKS[task].metrics, of_row, number, dense, times or {}))
        found.append(Section(task, steps, TASKS[task].metrics, models, list(own.values())))
    return found


def _summarize(
    metrics: Sequence[Metric],
    runs: Mapping[Key, dict[str, Any]],
    number: int,
    dense: Mapping[int, dict[str, Any]],
    times: Times,
) -> ModelSummary:
    """Take together the models with one number in all runs of a row."""
    name = next(iter(runs)).row
    models = {key.seed: run["models"][number] for key, run in runs.items()}
    first = next(iter(models.values()))
    row_runs, key = list(runs.values()), metrics[0].key
    pairs = [
        (model["quality"][key], dense[seed]["models"][0]["quality"][key])
        for seed, model in models.items()
        if seed in dense
    ]
    timed = [times[key][first["weight_dtype"]] for key in runs if first["weight_dtype"] in times.get(key, {})]
    return ModelSummary(
        row=KNOWN.get(name, Row(name, OTHER)),
        weight_dtype=first["weight_dtype"],
        hidden_size=row_runs[0]["hidden_size"],
        sparsity=_mean(run["sparsity"] for run in row_runs),
        quality={
            metric.key: spread
            for metric in metrics
            if (spread := Spread.of(model["quality"][metric.key] for model in models.values()))
        },
        loss_percent=Spread.of(100 * (own - other) / other for own, other in pairs),
        parameters=_mean(run["parameters"] for run in row_runs),
        nbytes=_mean(model["bytes"] for model in models.values()),
        us_per_step=timed[0]["us_per_step"] if timed else None,
        torch_us_per_step=timed[0]["torch_us_per_step"] if timed else None,
    )


def _mean(values: Any) -> float:
    spread = Spread.of(values)
    assert spread is not None
    return spread.mean
