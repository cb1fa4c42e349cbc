"""Evidence for zeroed gate gradients: run, table, plot.

    python -m studies.gate_gradients run [--task characters] [--rows headline] [--steps N] [--out FILE.jsonl]
    python -m studies.gate_gradients table FILE.jsonl...
    python -m studies.gate_gradients plot FILE.jsonl... --out DIR

`run` adds what is missing in FILE, a line for each finished run, so that it goes on after Ctrl-C where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from studies.gate_gradients.rows import RECORDS, ROWS, rows_of
from studies.gate_gradients.table import tables
from studies.runs.command_line import exit_status, positive
from studies.tasks import TASKS

DEFAULT_FILE = Path("gate-gradients.jsonl")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; 2 for what cannot be done."""
    options = _parser().parse_args(arguments)
    do = {"run": _run, "table": _table, "plot": _plot}[options.command]
    goes_on = f"after the last finished run in {options.out}" if options.command == "run" else ""
    return exit_status("studies.gate_gradients", lambda: do(options), goes_on=goes_on)


def _run(options: argparse.Namespace) -> None:
    from studies.gate_gradients.runner import run_missing

    for name in options.task or TASKS:
        run_missing(TASKS[name].load(), rows_of(options.rows, options.row or ()), options.out, steps=options.steps)


def _table(options: argparse.Namespace) -> None:
    print(tables(RECORDS.read_files(options.files)))


def _plot(options: argparse.Namespace) -> None:
    from studies.gate_gradients.plots import plot_all

    print(*plot_all(RECORDS.read_files(options.files), options.out), sep="\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m studies.gate_gradients", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train what is missing in a file")
    run.add_argument("--task", action="append", choices=[*TASKS], help="may be repeated (default: all)")
    run.add_argument("--rows", choices=["headline", "all"], default="all", help="(default: %(default)s)")
    names = [row.name for row in ROWS]
    only = "only this row and the dense one; may be repeated: " + "; ".join(names).replace("%", "%%")
    run.add_argument("--row", action="append", choices=names, metavar="NAME", help=only)
    run.add_argument("--steps", type=positive, help="optimizer steps of every run (default: the task's own)")
    run.add_argument("--out", type=Path, default=DEFAULT_FILE, metavar="FILE", help="(default: %(default)s)")
    table = commands.add_parser("table", help="print Markdown")
    plot = commands.add_parser("plot", help="draw the trade-off and the distributions")
    plot.add_argument("--out", type=Path, required=True, metavar="DIR", help="that holds, or gets, the pictures")
    for command in (table, plot):
        command.add_argument("files", nargs="+", type=Path, metavar="FILE", help="that run wrote")
    return parser


if __name__ == "__main__":
    sys.exit(main())
