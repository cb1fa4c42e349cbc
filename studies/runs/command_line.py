"""The program of a study.

    python -m studies.NAME run [TASK...] [--rows SELECTION] [--row NAME] [--seed N] [--steps N] [--out FILE]
    python -m studies.NAME time FILE...
    python -m studies.NAME table FILE...
    python -m studies.NAME plot FILE... --out DIR

`run` trains what is missing in its file, a line for each finished run, so that it goes on after Ctrl-C where it was.
`time` is apart, for a machine that is quiet by then; a study that times nothing lacks it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from studies.runs.study import Place, Study
from studies.tasks.task import MissingDataError

INTERRUPTED = 130  # exit status of a program that Ctrl-C ended


def main(study: Study, arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says, and return the exit status: 2, with a line of why, for what cannot be done."""
    options = _parser(study).parse_args(arguments)
    try:
        options.do(study, options)
    except KeyboardInterrupt:
        is_run = options.do is _run
        goes_on = f"; the same command goes on after the last finished run in {options.out}" if is_run else ""
        print(f"Stopped{goes_on}", file=sys.stderr)
        return INTERRUPTED
    except (OSError, ValueError, MissingDataError) as error:
        print(f"studies.{study.name}: {error}", file=sys.stderr)
        return 2
    return 0


def _run(study: Study, options: argparse.Namespace) -> None:
    place, rows = Place(options.out, options.models), study.rows(options.rows, options.row or ())
    for name in options.task or study.tasks:
        study.run_missing(study.load(name, place), rows, place, steps=options.steps, seeds=options.seed)


def _time(study: Study, options: argparse.Namespace) -> None:
    assert study.time is not None
    for line in study.time(study.records.read_files(options.files), options.models):
        study.records.append(options.out, line)


def _table(study: Study, options: argparse.Namespace) -> None:
    print(study.tables(study.records.read_files(options.files)))


def _plot(study: Study, options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    print(*study.plot(study.records.read_files(options.files), options.out), sep="\n")


def _parser(study: Study) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m studies.{study.name}", description=study.title)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="train what is missing in a file")
    run.set_defaults(do=_run)
    names = ", ".join(study.tasks)
    run.add_argument("task", nargs="*", choices=[*study.tasks, []], metavar="TASK", help=f"{names} (default: all)")
    run.add_argument("--rows", choices=[*study.selections], default=study.usual, help="(default: %(default)s)")
    rows = [row.name for row in study.rows()]
    only = "only this row, and what it is compared with; may be repeated: " + "; ".join(rows).replace("%", "%%")
    run.add_argument("--row", action="append", choices=rows, metavar="NAME", help=only)
    run.add_argument("--seed", action="append", type=int, help="may be repeated (default: the rows' own)")
    run.add_argument("--steps", type=_positive, help="optimizer steps of every run (default: the task's own)")
    readers = [commands.add_parser("table", help="print Markdown"), commands.add_parser("plot", help="draw pictures")]
    for command, do in zip(readers, (_table, _plot), strict=True):
        command.set_defaults(do=do)
    readers[1].add_argument("--out", type=Path, required=True, metavar="DIR", help="that holds, or gets, the pictures")
    writers = [run]
    if study.time is not None:
        timing = commands.add_parser("time", help="measure the models of finished runs")
        timing.set_defaults(do=_time)
        readers.append(timing)
        writers.append(timing)
    for command in writers:
        file, models = Path(f"{study.name}.jsonl".replace("_", "-")), Path(f"{study.name}-models")
        command.add_argument("--out", type=Path, default=file, metavar="FILE", help="(default: %(default)s)")
        command.set_defaults(models=models)
        if study.keeps_models:
            command.add_argument("--models", type=Path, default=models, metavar="DIR", help="(default: %(default)s)")
    for command in readers:
        command.add_argument("files", nargs="+", type=Path, metavar="FILE", help="that run or time wrote")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return int(text)
