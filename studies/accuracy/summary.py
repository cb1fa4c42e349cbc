"""Runs of one row taken together: means, and differences to the dense run of the same seed and steps."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from studies.accuracy.rows import DENSE, ROWS, Row
from studies.runs.records import Lines, key_of
from studies.runs.sections import OTHER, Section, sections
from studies.runs.spread import Spread
from studies.tasks.task import Metric

KNOWN = {row.name: row for row in ROWS}
FLOAT32 = "float32"


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


AccuracySection = Section[ModelSummary]


def models_of(lines: Lines) -> list[AccuracySection]:
    """Return sections with every model of every row, in the order of ROWS."""

    def summarize(
        runs: Sequence[dict[str, Any]], dense: Mapping[int, dict[str, Any]], metrics: Sequence[Metric]
    ) -> Iterator[ModelSummary]:
        timed = [time for run in runs if (line := lines.times.get(key_of(run))) for time in line["times"]]
        for number in range(len(runs[0]["models"])):
            yield _summarize(runs, number, dense, metrics, timed)

    return sections(lines.runs, [*KNOWN], summarize, baseline=DENSE.name)


def model_of(section: AccuracySection, row: Row) -> ModelSummary | None:
    """Return a row's model in float32, None if there is none."""
    return next((model for model in section.models if model.row is row and model.weight_dtype == FLOAT32), None)


def _summarize(
    runs: Sequence[dict[str, Any]],
    number: int,
    dense: Mapping[int, dict[str, Any]],
    metrics: Sequence[Metric],
    timed: Sequence[Mapping[str, Any]],
) -> ModelSummary:
    """Take together the models with one number in all runs of a row."""
    name, key, models = runs[0]["row"], metrics[0].key, [run["models"][number] for run in runs]
    pairs = [
        (run["models"][number]["quality"][key], dense[run["seed"]]["models"][0]["quality"][key])
        for run in runs
        if run["seed"] in dense
    ]
    time = next((time for time in timed if time["weight_dtype"] == models[0]["weight_dtype"]), {})
    return ModelSummary(
        row=KNOWN.get(name, Row(name, OTHER)),
        weight_dtype=models[0]["weight_dtype"],
        hidden_size=runs[0]["hidden_size"],
        sparsity=statistics.fmean(run["sparsity"] for run in runs),
        quality=Spread.by_key(model["quality"] for model in models),
        loss_percent=Spread.of(100 * (own - other) / other for own, other in pairs),
        parameters=statistics.fmean(run["parameters"] for run in runs),
        nbytes=statistics.fmean(model["bytes"] for model in models),
        us_per_step=time.get("us_per_step"),
        torch_us_per_step=time.get("torch_us_per_step"),
    )
