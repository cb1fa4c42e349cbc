"""What this study is made of."""

from __future__ import annotations

from typing import Any

from studies.gate_gradients.plots import plot_all
from studies.gate_gradients.rows import CALIBRATION_SEED, DENSE, SELECTIONS, Row
from studies.gate_gradients.table import tables
from studies.gate_gradients.training import calibrated_thresholds, train
from studies.runs.records import Key, Records
from studies.runs.study import OnStep, Place, Study
from studies.tasks import Task

RECORDS = Records(
    "studies.gate_gradients",
    frozenset({"settings", "gate_gradient", "quality", "zeros", "redundant_macs", "distribution"}),
)


def settings(task: Task, row: Row, steps: int) -> dict[str, Any]:
    return {"task": task.settings(), "row": row.settings()}


def train_calibrated(task: Task, row: Row, key: Key, place: Place, on_step: OnStep) -> dict[str, Any]:
    """Train; the threshold of a row with a quantile is taken from the dense run of CALIBRATION_SEED in the file."""
    thresholds = {}
    if row.quantile is not None:
        dense = RECORDS.read_files([place.file]).runs.get(key._replace(row=DENSE.name, seed=CALIBRATION_SEED))
        if dense is None:
            raise ValueError(f"{row.name!r} needs the dense run of seed {CALIBRATION_SEED}, which {place.file} lacks")
        thresholds = calibrated_thresholds(dense, task.loss_scale)
    return train(task, row, key, thresholds, on_step)


def outcome(task: Task, run: dict[str, Any]) -> str:
    return task.metrics[0].text(run["quality"])


GATE_GRADIENTS = Study(
    name="gate_gradients",
    title="What zeroed gate gradients cost and save in the training of LSTMs.",
    records=RECORDS,
    selections=SELECTIONS,
    always=(DENSE,),
    settings=settings,
    train=train_calibrated,
    outcome=outcome,
    tables=tables,
    plot=plot_all,
)
