"""What this study is made of."""

from __future__ import annotations

from typing import Any

from studies.accuracy.plots import plot_all
from studies.accuracy.rows import CLAIMS, DENSE, OTHERS, SELECTIONS, Row
from studies.accuracy.sizes import size_of
from studies.accuracy.table import tables
from studies.accuracy.timing import time_runs
from studies.accuracy.training import LARGEST_GRADIENT, train
from studies.runs.records import Records
from studies.runs.study import Study
from studies.tasks import Task


def settings(task: Task, row: Row, steps: int) -> dict[str, Any]:
    """Return what decides the outcome of a run, for JSON."""
    own = task.settings() | {"hidden_size": size_of(task, row).hidden_size}
    return {"task": own, "row": row.settings(), "largest_gradient": LARGEST_GRADIENT}


def outcome(task: Task, run: dict[str, Any]) -> str:
    return f"{task.metrics[0].text(run['models'][0]['quality']['validation'])}, {run['parameters']:,} parameters"


def suits(task: Task, row: Row) -> bool:
    """Whether a row is run: what sounds are heard with has no embedding, and one width is enough of them."""
    return row.family in (CLAIMS, OTHERS) or task.name != "sounds"


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
    usual="long",
    suits=suits,
    settings=settings,
    train=train,
    outcome=outcome,
    tables=tables,
    plot=plot_all,
    time=time_runs,
    keeps_models=True,
    steps={"characters": 6400, "pronunciation": 16_000, "sounds": 12_800},
)
