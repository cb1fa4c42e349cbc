"""What this study is made of."""

from __future__ import annotations

from typing import Any

from studies.accuracy.plots import plot_all
from studies.accuracy.rows import DENSE, SELECTIONS, Row
from studies.accuracy.sizes import size_of
from studies.accuracy.table import tables
from studies.accuracy.timing import time_runs
from studies.accuracy.training import train
from studies.runs.records import Records
from studies.runs.study import Study
from studies.tasks import Task


def settings(task: Task, row: Row, steps: int) -> dict[str, Any]:
    return {"task": task.settings() | {"hidden_size": size_of(task, row).hidden_size}, "row": row.settings()}


def outcome(task: Task, run: dict[str, Any]) -> str:
    return f"{task.metrics[0].text(run['models'][0]['quality'])}, {run['parameters']:,} parameters"


ACCURACY = Study(
    name="accuracy",
    title="What pruning costs and saves on real tasks.",
    records=Records(
        "studies.accuracy",
        frozenset({"settings", "hidden_size", "pruner", "sparsity", "forecast", "models"}),
        times=frozenset({"times"}),
    ),
    selections=SELECTIONS,
    always=(DENSE,),
    settings=settings,
    train=train,
    outcome=outcome,
    tables=tables,
    plot=plot_all,
    time=time_runs,
    keeps_models=True,
    steps={"characters": 800, "pronunciation": 2000},
)
