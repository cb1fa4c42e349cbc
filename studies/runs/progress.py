"""How a program shows the run under way and those that are done, and that each run has one thread."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RunUnderWay(NamedTuple):
    """What a run calls.

    Attributes:
        on_step: after each optimizer step, with its loss.
        finish: at the end, with a line that says what came of it.
    """

    on_step: Callable[[float], None]
    finish: Callable[[str], None]


@contextlib.contextmanager
def run_bars(console: Console, title: str, runs: int, done: int) -> Iterator[Callable[[str, int], RunUnderWay]]:
    """Show a bar for all runs and one for the run under way.

    Yields:
        A function that begins a run, of its name and its number of steps.
    """
    columns = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console) as progress:
        all_runs = progress.add_task(f"{title}, runs", total=runs, completed=done, state="")
        current = progress.add_task("", total=1, state="", visible=False)

        def begin(name: str, steps: int) -> RunUnderWay:
            progress.reset(current, description=name, total=steps, visible=True, state="")

            def on_step(loss: float) -> None:
                progress.update(current, advance=1, state=f"loss {loss:.3f}")

            def finish(outcome: str) -> None:
                progress.advance(all_runs)
                line = f"{time.strftime('%H:%M:%S')}  {title}, {name}: {outcome}"
                progress.console.print(line, highlight=False, soft_wrap=True)

            return RunUnderWay(on_step, finish)

        yield begin


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
