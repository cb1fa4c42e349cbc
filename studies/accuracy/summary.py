"""Runs of one row taken together: means, and differences to the dense run of the same seed."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from studies.accuracy.rows import DENSE, ROWS, Row
from studies.runs.records import Lines, key_of
from studies.runs.sections import OTHER, Section, sections
from studies.runs.spread import Spread
from studies.tasks.task import HeldOut, Metric

KNOWN = {row.name: row for row in ROWS}
FLOAT32 = "float32"


class ModelSummary(NamedTuple):
    """A row in one weight dtype, over all its seeds.

    Attributes:
        quality: by split and metric.
        loss_percent: by split, how much worse the first metric is than the dense run's of the same seed, in % of it;
            not there if there is no such seed.
        trained_steps, seconds: of training, with that of the dense model where it began with one.
        parameters, nbytes: of the whole model, those that are not zero, and of its file.
        us_per_step, torch_us_per_step: of its layer, by this package and by nn.GRU; None where it was not timed.
    """

    row: Row
    weight_dtype: str
    hidden_size: int
    sparsity: float
    quality: dict[str, dict[str, Spread]]
    loss_percent: dict[str, Spread]
    trained_steps: int
    seconds: float
    parameters: float
    nbytes: float
    us_per_step: float | None
    torch_us_per_step: float | None

    @property
    def name(self) -> str:
        return self.row.name + (f", {self.weight_dtype}" if self.weight_dtype != FLOAT32 else "")

    @property
    def split(self) -> HeldOut:
        """The one to tell of: the test split, unless the row is there to choose from."""
        return "test" if "test" in self.quality else "validation"

    @property
    def worse(self) -> Spread | None:
        """`loss_percent` on that split."""
        return self.loss_percent.get(self.split)

    def metric(self, metric: Metric) -> Spread:
        """A metric on that split."""
        return self.quality[self.split][metric.key]


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
    name, models = runs[0]["row"], [run["models"][number] for run in runs]
    row = KNOWN.get(name, Row(name, OTHER))
    splits = [*models[0]["quality"]]
    before = statistics.fmean(run["seconds"] for run in dense.values()) if row.begins_dense and dense else 0.0
    time = next((time for time in timed if time["weight_dtype"] == models[0]["weight_dtype"]), {})
    return ModelSummary(
        row=row,
        weight_dtype=models[0]["weight_dtype"],
        hidden_size=runs[0]["hidden_size"],
        sparsity=statistics.fmean(run["sparsity"] for run in runs),
        quality={split: Spread.by_key(model["quality"][split] for model in models) for split in splits},
        loss_percent={
            split: spread
            for split in splits
            if (spread := worse(runs, dense, split, metrics[0].key, number)) is not None
        },
        trained_steps=runs[0].get("trained_steps", runs[0]["steps"]),
        seconds=before + statistics.fmean(run["seconds"] for run in runs),
        parameters=statistics.fmean(run["parameters"] for run in runs),
        nbytes=statistics.fmean(model["bytes"] for model in models),
        us_per_step=time.get("us_per_step"),
        torch_us_per_step=time.get("torch_us_per_step"),
    )


def worse(
    runs: Sequence[Mapping[str, Any]], others: Mapping[int, Mapping[str, Any]], split: str, key: str, number: int = 0
) -> Spread | None:
    """Return by how much runs are worse than others, in % of these, over the seeds that both have; None: there is none.

    Args:
        others: by seed, of which the first model counts.
        key: of a metric.
        number: of the model of each run that counts.
    """
    pairs = [
        (run["models"][number]["quality"][split][key], others[run["seed"]]["models"][0]["quality"][split][key])
        for run in runs
        if run["seed"] in others and split in others[run["seed"]]["models"][0]["quality"]
    ]
    return Spread.of(100 * (own - base) / base for own, base in pairs)
