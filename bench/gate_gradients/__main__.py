"""Evidence for zeroed gate gradients: run, table, plot.

    python -m bench.gate_gradients run [--task characters] [--rows headline] [--steps N] [--out FILE.jsonl]
    python -m bench.gate_gradients table FILE.jsonl...
    python -m bench.gate_gradients plot FILE.jsonl... --out DIR

`run` adds what is missing in FILE, a line for each finished run, so that it goes on after Ctrl-C where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.gate_gradients.rows import RECORDS, ROWS, rows_of
from bench.gate_gradients.table import tables
from bench.tasks import TASKS
from bench.tasks.task import MissingDataError

DEFAULT_FILE = Path("gate-gradients.jsonl")
INTERRUPTED = 130  # exit status of a program that Ctrl-C ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; 2 for what cannot be done."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "run":
            return _run(options)
        runs = RECORDS.read_files(options.files)
        if options.command == "table":
            print(tables(runs))
        else:
            from bench.gate_gradients.plots import plot_all

            print(*plot_all(runs, options.out), sep="\n")
    except (OSError, ValueError, MissingDataError) as error:
        print(f"bench.gate_gradients: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> int:
    from bench.gate_gradients.runner import run_missing

    try:
        for name in options.task or TASKS:
            run_missing(TASKS[name].load(), rows_of(options.rows, options.row or ()), options.out, steps=options.steps)
    except KeyboardInterrupt:
        print(f"Stopped; the same command goes on after the last finished run in {options.out}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gate_gradients", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train what is missing in a file")
    run.add_argument("--task", action="append", choices=[*TASKS], help="may be repeated (default: all)")
    run.add_argument("--rows", choices=["headline", "all"], default="all", help="(default: %(default)s)")
    names = [row.name for row in ROWS]
    only = "only this row and the dense one; may be repeated: " + "; ".join(names).replace("%", "%%")
    run.add_argument("--row", action="append", choices=names, metavar="NAME", help=only)
    run.add_argument("--steps", type=_positive, help="optimizer steps of every run (default: the task's own)")
    run.add_argument("--out", type=Path, default=DEFAULT_FILE, metavar="FILE", help="(default: %(default)s)")
    table = commands.add_parser("table", help="print Markdown")
    plot = commands.add_parser("plot", help="draw the trade-off and the distributions")
    plot.add_argument("--out", type=Path, required=True, metavar="DIR", help="that holds, or gets, the pictures")
    for command in (table, plot):
        command.add_argument("files", nargs="+", type=Path, metavar="FILE", help="that run wrote")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
