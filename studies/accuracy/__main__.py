"""What pruning costs and saves on real tasks: run, time, table, plot.

    python -m studies.accuracy run [TASK...] [--rows headline] [--out FILE.jsonl] [--models DIR]
    python -m studies.accuracy time FILE.jsonl... --models DIR [--out TIMES.jsonl]
    python -m studies.accuracy table FILE.jsonl... [--times TIMES.jsonl]
    python -m studies.accuracy plot FILE.jsonl... --out DIR [--times TIMES.jsonl]

`run` trains what is missing in FILE, a line for each finished run, so that it goes on after Ctrl-C where it was. `time`
measures the layers of those runs on a machine that is quiet by then.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from studies.accuracy.rows import RECORDS, ROWS, rows_of
from studies.runs.command_line import exit_status, positive
from studies.tasks import TASKS

DEFAULT_FILE, DEFAULT_MODELS, DEFAULT_TIMES = Path("accuracy.jsonl"), Path("accuracy-models"), Path("times.jsonl")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; 2 for what cannot be done."""
    options = _parser().parse_args(arguments)
    do = {"run": _run, "time": _time, "table": _table, "plot": _plot}[options.command]
    goes_on = f"after the last finished run in {options.out}" if options.command == "run" else ""
    return exit_status("studies.accuracy", lambda: do(options), goes_on=goes_on)


def _run(options: argparse.Namespace) -> None:
    from studies.accuracy.runner import run_missing

    rows = rows_of(options.rows, options.row or ())
    for name in options.task or TASKS:
        run_missing(
            TASKS[name].load(), rows, options.out, options.models, steps=options.steps, seeds=options.seed or None
        )


def _time(options: argparse.Namespace) -> None:
    from studies.accuracy.timing import time_runs

    time_runs(RECORDS.read_files(options.files), options.models, options.out)


def _table(options: argparse.Namespace) -> None:
    from studies.accuracy.table import tables
    from studies.accuracy.timing import read_times

    print(tables(RECORDS.read_files(options.files), read_times(options.times)))


def _plot(options: argparse.Namespace) -> None:
    from studies.accuracy.plots import plot_all
    from studies.accuracy.timing import read_times

    print(*plot_all(RECORDS.read_files(options.files), read_times(options.times), options.out), sep="\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m studies.accuracy", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train what is missing in a file")
    run.add_argument("task", nargs="*", choices=[*TASKS, []], metavar="TASK", help=f"{', '.join(TASKS)} (default: all)")
    selections = ["headline", "others", "sensitivity", "all"]
    run.add_argument("--rows", choices=selections, default="all", help="(default: %(default)s)")
    names = [row.name for row in ROWS]
    only = "only this row and the dense one; may be repeated: " + "; ".join(names).replace("%", "%%")
    run.add_argument("--row", action="append", choices=names, metavar="NAME", help=only)
    run.add_argument("--seed", action="append", type=int, help="may be repeated (default: the rows' own)")
    run.add_argument("--steps", type=positive, help="optimizer steps of every run (default: the task's own)")
    run.add_argument("--out", type=Path, default=DEFAULT_FILE, metavar="FILE", help="(default: %(default)s)")
    run.add_argument("--models", type=Path, default=DEFAULT_MODELS, metavar="DIR", help="(default: %(default)s)")
    time = commands.add_parser("time", help="measure the layers of finished runs")
    time.add_argument("--models", type=Path, default=DEFAULT_MODELS, metavar="DIR", help="(default: %(default)s)")
    time.add_argument("--out", type=Path, default=DEFAULT_TIMES, metavar="FILE", help="(default: %(default)s)")
    table = commands.add_parser("table", help="print Markdown")
    plot = commands.add_parser("plot", help="draw accuracy over parameters, and the sensitivity to a schedule")
    plot.add_argument("--out", type=Path, required=True, metavar="DIR", help="that holds, or gets, the pictures")
    for command in (table, plot):
        command.add_argument("--times", action="append", type=Path, default=[], metavar="FILE", help="that time wrote")
    for command in (time, table, plot):
        command.add_argument("files", nargs="+", type=Path, metavar="FILE", help="that run wrote")
    return parser


if __name__ == "__main__":
    sys.exit(main())
