"""Turn pytest-benchmark's JSON into tables and plots.

    pytest bench --benchmark-json=run-1.json          (several processes: run-2.json, ...)
    python -m bench.report run-*.json
    python -m bench.report run-*.json --break-even --plot ratios.png --plot-peers peers.png
    python -m bench.report rows.jsonl --gpu           (or --gpu-goals; files of bench/gpu_check.sh)

A ratio is the median time of the baseline, the layer of torch.nn, over that of a contender, in one process; with
several files it is the median of these ratios, and the smallest and largest are shown beside it. The largest error is
against float64.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.cpu import break_even
from bench.gpu import report as gpu
from bench.plots import plot_peers, plot_ratios
from bench.rows import Row, markdown, read_rows

HEADINGS = ("workload", "contender", "µs a call", "µs a step", "ratio", "smallest to largest", "largest error")


def tables(rows: Sequence[Row]) -> str:
    """Return a Markdown table for each suite, under its name; a group is named once."""
    parts = []
    for suite in dict.fromkeys(row.suite for row in rows):
        cells = []
        for group in dict.fromkeys(row.group for row in rows if row.suite == suite):
            in_group = [row for row in rows if (row.suite, row.group) == (suite, group)]
            cells += [[group if i == 0 else "", *_cells(row)] for i, row in enumerate(in_group)]
        parts += [f"## {suite}", markdown(HEADINGS, cells)]
    return "\n\n".join(parts)


def _cells(row: Row) -> list[str]:
    return [
        row.contender,
        f"{row.median_us:.1f}",
        f"{row.median_us / row.facts['T']:.2f}" if "T" in row.facts else "",
        f"{statistics.median(row.ratios):.2f}" if row.ratios else "",
        f"{min(row.ratios):.2f} to {max(row.ratios):.2f}" if row.ratios else "",
        f"{row.facts['max_error']:.1e}" if "max_error" in row.facts else "",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; write the plots if asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="of pytest --benchmark-json or --record")
    others = parser.add_mutually_exclusive_group()
    others.add_argument("--break-even", action="store_true", help="instead print from which sparsity on ours is faster")
    others.add_argument("--gpu", action="store_true", help="instead print a line for each layer of the GPU suites")
    others.add_argument("--gpu-goals", action="store_true", help="instead print which goals on a GPU are met")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw the ratios of whole sequences at batch 1")
    parser.add_argument("--plot-peers", type=Path, metavar="PNG", help="also draw the times of ours and of the peers")
    options = parser.parse_args(arguments)
    try:
        rows = read_rows(options.files)
    except (OSError, ValueError) as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 2
    prints = {"break_even": break_even.table, "gpu": gpu.table, "gpu_goals": gpu.goals}
    print(next((make for name, make in prints.items() if getattr(options, name)), tables)(rows))
    if options.plot:
        plot_ratios(rows, options.plot)
    if options.plot_peers:
        plot_peers(rows, options.plot_peers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
