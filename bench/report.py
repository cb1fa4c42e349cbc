"""Turn pytest-benchmark's JSON into a table of ratios and a plot.

    pytest bench --benchmark-json=run-1.json          (several processes: run-2.json, ...)
    python -m bench.report run-*.json --plot ratios.png

A ratio is the median time of the baseline over that of a contender, in one process; with several files it is the median
of these ratios, and the smallest and largest are shown beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

BASELINES = ("nn.GRU", "without pruner")


class Row(NamedTuple):
    """One contender in one group, over all files."""

    group: str
    contender: str
    median_us: float
    ratios: list[float]
    facts: dict[str, Any]


def read_rows(paths: Sequence[Path]) -> list[Row]:
    """Return a row for each contender of each group, in the order of the first file.

    Raises:
        ValueError: a file is not pytest-benchmark's JSON.
    """
    times: dict[tuple[str, str], list[float]] = {}
    ratios: dict[tuple[str, str], list[float]] = {}
    facts: dict[tuple[str, str], dict[str, Any]] = {}
    for path in paths:
        in_file: dict[tuple[str, str], float] = {}
        try:
            for entry in json.loads(path.read_text(encoding="utf-8"))["benchmarks"]:
                key = entry["group"], entry["extra_info"].get("contender", entry["name"])
                in_file[key] = entry["stats"]["median"] * 1e6
                facts[key] = entry["extra_info"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not JSON that pytest --benchmark-json wrote ({error!r})") from error
        for (group, contender), median_us in in_file.items():
            times.setdefault((group, contender), []).append(median_us)
            baseline = next((in_file[group, name] for name in BASELINES if (group, name) in in_file), None)
            if baseline is not None:
                ratios.setdefault((group, contender), []).append(baseline / median_us)
    return [
        Row(group, contender, statistics.median(values), ratios.get((group, contender), []), facts[group, contender])
        for (group, contender), values in times.items()
    ]


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table."""
    lines = [
        "| workload | contender | µs a call | µs a step | ratio | smallest to largest |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        step = f"{row.median_us / row.facts['T']:.2f}" if row.facts.get("T") else ""
        ratio = f"{statistics.median(row.ratios):.2f}" if row.ratios else ""
        spread = f"{min(row.ratios):.2f} to {max(row.ratios):.2f}" if row.ratios else ""
        lines.append(f"| {row.group} | {row.contender} | {row.median_us:.1f} | {step} | {ratio} | {spread} |")
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the ratio to nn.GRU over hidden size for whole sequences at batch 1, a line for each sparsity."""
    from matplotlib.figure import Figure

    lines: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        facts = row.facts
        if facts.get("B") != 1 or facts.get("T", 0) < 2 or row.contender == "nn.GRU" or not row.ratios:
            continue
        sparsity = 0 if row.contender.endswith("0 % zeros") else facts["sparsity"]
        name = f"{100 * sparsity:g} % zeros"
        lines.setdefault(name, {}).setdefault(facts["H"], []).append(statistics.median(row.ratios))
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in sorted(lines, key=lambda name: float(name.split()[0]), reverse=True):
        points = sorted((H, statistics.median(values)) for H, values in lines[name].items())
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    sizes = sorted({H for points in lines.values() for H in points})
    axes.set_xticks(sizes, [str(H) for H in sizes])
    axes.set_ylim(0)
    axes.set(xlabel="hidden size = input size", ylabel="times as fast as nn.GRU")
    axes.set_title("PersistentGRU, batch 1, float32, one CPU thread")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; write the plot if asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON of pytest --benchmark-json")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw the ratios of whole sequences at batch 1")
    options = parser.parse_args(arguments)
    try:
        rows = read_rows(options.files)
    except (OSError, ValueError) as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    if options.plot:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
