"""A study: rows, each trained with several seeds on tasks, into a file that is taken up where it ends."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from safetensors.torch import save
from torch import nn

from studies.runs.progress import one_thread, run_bars
from studies.runs.records import Key, Lines, Records, line_of
from studies.tasks import TASKS
from triton_sparse_rnn.atomic_files import write_atomically

OnStep = Callable[[float], None]  # called with the loss after every optimizer step


class Place(NamedTuple):
    """The file of a study's lines, and the folder of its weights."""

    file: Path
    models: Path


@dataclasses.dataclass(frozen=True)
class Study:
    """What one study says of itself; `studies.runs.command_line.main` is its program.

    A row has `name` and `seeds`, a task `name` and `steps`.

    Attributes:
        name: of its folder, and of its files.
        title: what it shows, in a line.
        selections: rows by a word of the command line; "all" is one of them.
        always: rows that others are compared with or learn from: they run whatever is chosen, and first.
        steps: of a run, by task, where not the task's own.
        untrained: names of rows that are only evaluated; their runs have seed 0 and no step.
        usual: the selection that is run unless the command line names another.
        suits: whether a row is run on a task.
        settings: of task, row and steps: what decides the outcome beside the run's name, for JSON.
        train: one model, of task, row, the run's name, the place and what is called after every step; returns what came
            of it, for JSON.
        outcome: of task and run, in a few words.
        tables: Markdown.
        plot: draws pictures into a folder, and returns their paths.
        time: measures models of a folder, and yields lines for the file; None: nothing is timed.
        keeps_models: whether `train` keeps weights.
        load: reads the data of a task, or raises MissingDataError.
    """

    name: str
    title: str
    records: Records
    selections: Mapping[str, Sequence[Any]]
    always: Sequence[Any]
    settings: Callable[[Any, Any, int], dict[str, Any]]
    train: Callable[[Any, Any, Key, Place, OnStep], dict[str, Any]]
    outcome: Callable[[Any, dict[str, Any]], str]
    tables: Callable[[Lines], str]
    plot: Callable[[Lines, Path], list[Path]]
    time: Callable[[Lines, Path], Iterable[dict[str, Any]]] | None = None
    keeps_models: bool = False
    steps: Mapping[str, int] = dataclasses.field(default_factory=dict)
    untrained: Sequence[str] = ()
    usual: str = "all"
    suits: Callable[[Any, Any], bool] = lambda task, row: True
    tasks: Sequence[str] = (*TASKS,)
    load: Callable[[str, Place], Any] = lambda name, place: TASKS[name].load()

    def rows(self, selection: str = "all", names: Sequence[str] = ()) -> list[Any]:
        """Return the rows of a selection, or those of some names."""
        chosen = [row for row in self.selections["all"] if row.name in names] if names else self.selections[selection]
        return [*self.always, *(row for row in chosen if row not in self.always)]

    def run(self, task: Any, row: Any, key: Key, place: Place, on_step: OnStep = lambda loss: None) -> dict[str, Any]:
        """Train one model and return its line."""
        began = time.perf_counter()
        facts = self.train(task, row, key, place, on_step)
        settings = self.settings(task, row, key.steps)
        return line_of(key, settings=settings, **facts, seconds=time.perf_counter() - began)

    def run_missing(
        self,
        task: Any,
        rows: Sequence[Any],
        place: Place,
        *,
        steps: int | None = None,
        seeds: Sequence[int] | None = None,
        console: Console | None = None,
    ) -> None:
        """Run all rows with their seeds, but for those that the file holds, one thread each.

        Args:
            steps, seeds: None for the task's and each row's own.
        Raises:
            ValueError: the file is not ours, or holds a run of the same name with other settings; or the folder lacks
                the weights of such a run.
            KeyboardInterrupt: Ctrl-C; the file holds all finished runs.
        """
        steps, plan = steps or self.steps.get(task.name, task.steps), {}
        for row in (row for row in rows if self.suits(task, row)):
            trained = row.name not in self.untrained
            for seed in seeds or row.seeds if trained else (0,):
                plan[Key(task.name, row.name, seed, steps if trained else 0)] = row
        missing = self.records.missing(
            place.file, {key: self.settings(task, row, key.steps) for key, row in plan.items()}
        )
        if self.keeps_models:
            place.models.mkdir(parents=True, exist_ok=True)
            self._check_weights([key for key in plan if key.steps and key not in missing], place)
        with one_thread(), run_bars(console or Console(), task.name, len(plan), len(plan) - len(missing)) as begin:
            for key in sorted(missing, key=lambda key: key.seed):  # the first rows of a seed come before its others
                under_way = begin(f"{key.row}, seed {key.seed}", key.steps)
                run = self.run(task, plan[key], key, place, under_way.on_step)
                self.records.append(place.file, run)
                under_way.finish(f"{self.outcome(task, run)}, {run['seconds']:.0f} s")

    def _check_weights(self, finished: Iterable[Key], place: Place) -> None:
        for key in finished:
            if not weights_path(place.models, key).exists():
                what = f"the weights of {key.row!r}, seed {key.seed}, which {place.file} has as finished"
                raise ValueError(f"{place.models} lacks {what}")


def weights_path(models: Path, key: Key) -> Path:
    """Where the weights of a run are kept."""
    return models / f"{re.sub(r'[^a-z0-9.]+', '-', '-'.join(map(str, key)).lower())}.safetensors"


def keep_weights(model: nn.Module, models: Path, key: Key) -> None:
    """Write the weights of a run whole or not at all."""
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(weights_path(models, key), [save(weights)])
