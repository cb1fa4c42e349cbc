"""A trained denoiser pruned, fine-tuned and streamed: run, time, table, plot.

    python -m studies.denoising run --models DIR [--row "90 %"] [--steps N] [--out FILE.jsonl]
    python -m studies.denoising time --models DIR [--out FILE.jsonl]
    python -m studies.denoising table FILE.jsonl...
    python -m studies.denoising plot FILE.jsonl... --out FILE.png

`run` adds what is missing in FILE, a line for each finished run, so that it goes on after Ctrl-C where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from studies.denoising.rows import BY_NAME, ROWS
from studies.runs.command_line import exit_status, positive

DEFAULT_FILE = Path("denoising.jsonl")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; 2 for what cannot be done."""
    options = _parser().parse_args(arguments)
    return exit_status("studies.denoising", lambda: options.do(options), goes_on="after what is in the file")


def _run(options: argparse.Namespace) -> None:
    from studies.denoising.runner import run_missing
    from studies.denoising.training import Settings

    rows = [BY_NAME[name] for name in options.row] if options.row else list(ROWS)
    if options.seeds:
        rows = [dataclasses.replace(row, seeds=options.seeds) for row in rows]
    settings = Settings(steps=options.steps) if options.steps else Settings()
    run_missing(rows, options.models, options.out, settings)


def _time(options: argparse.Namespace) -> None:
    from studies.denoising.timing import time_all

    time_all(options.models, options.out)


def _table(options: argparse.Namespace) -> None:
    from studies.denoising.runner import RECORDS
    from studies.denoising.table import tables

    print(tables(RECORDS.read_files(options.files)))


def _plot(options: argparse.Namespace) -> None:
    from studies.denoising.plots import plot_quality
    from studies.denoising.runner import RECORDS

    plot_quality(RECORDS.read_files(options.files), options.out)
    print(options.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m studies.denoising", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="fine-tune what is missing in a file")
    run.set_defaults(do=_run)
    run.add_argument(
        "--row",
        action="append",
        choices=[*BY_NAME],
        metavar="NAME",
        help=f"may be repeated (default: all): {'; '.join(BY_NAME)}".replace("%", "%%"),
    )
    run.add_argument("--seeds", type=positive, help="runs of every row (default: the row's own)")
    run.add_argument("--steps", type=positive, help="optimizer steps of every run (default: 800)")
    timing = commands.add_parser("time", help="time the models of a file, within a minute")
    timing.set_defaults(do=_time)
    for command in (run, timing):
        command.add_argument("--models", type=Path, required=True, metavar="DIR", help="of decoded speech and weights")
        command.add_argument("--out", type=Path, default=DEFAULT_FILE, metavar="FILE", help="(default: %(default)s)")
    table = commands.add_parser("table", help="print Markdown")
    table.set_defaults(do=_table)
    plot = commands.add_parser("plot", help="draw SI-SDR over sparsity")
    plot.set_defaults(do=_plot)
    plot.add_argument("--out", type=Path, required=True, metavar="PNG")
    for command in (table, plot):
        command.add_argument("files", nargs="+", type=Path, metavar="FILE", help="that run and time wrote")
    return parser


if __name__ == "__main__":
    sys.exit(main())
