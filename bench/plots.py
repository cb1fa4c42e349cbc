"""What the suites of a layer's forward pass look like over hidden size. Needs matplotlib (extra `bench`)."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.rows import BASELINES, Row

Lines = dict[str, list[tuple[int, float]]]  # by label: H and value


def plot_ratios(rows: Sequence[Row], path: Path) -> None:
    """Draw the ratio to nn.GRU for whole sequences at batch 1, a line for each sparsity."""
    lines: Lines = {}
    for row in _sequences(rows, "bench_forward"):
        if row.contender in BASELINES or not row.ratios:
            continue
        name, sparsity = row.contender.partition(", ")[2], row.facts["sparsity"]
        label = name if name.endswith("0 % zeros") else f"{name or '16x1'}, {100 * sparsity:g} % zeros"
        lines.setdefault(label, []).append((row.facts["H"], statistics.median(row.ratios)))
    _draw(lines, path, "PersistentGRU, batch 1, float32, one CPU thread", "times as fast as nn.GRU")


def plot_peers(rows: Sequence[Row], path: Path) -> None:
    """Draw microseconds a step for whole sequences at batch 1, a line for each contender."""
    lines: Lines = {}
    for row in _sequences(rows, "bench_peers"):
        lines.setdefault(row.contender, []).append((row.facts["H"], row.median_us / row.facts["T"]))
    _draw(lines, path, "GRU, batch 1, 90 % zeros, one CPU thread", "µs a step", log_y=True)


def _sequences(rows: Iterable[Row], suite: str) -> list[Row]:
    return [
        row
        for row in rows
        if row.suite == suite and row.facts["cell"] == "GRU" and row.facts["B"] == 1 and row.facts["T"] > 1
    ]


def _draw(lines: Lines, path: Path, title: str, quantity: str, *, log_y: bool = False) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4), layout="constrained")
    axes = figure.add_subplot()
    # A size that several workloads share (other T) is drawn once.
    points = {
        label: {H: statistics.median(value for size, value in values if size == H) for H, _ in sorted(values)}
        for label, values in lines.items()
    }
    for label, line in sorted(points.items(), key=lambda item: list(item[1].values())[-1], reverse=True):
        axes.plot(list(line), list(line.values()), marker="o", label=label)
    sizes = sorted({H for line in points.values() for H in line})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(H) for H in sizes])
    if log_y:
        axes.set_yscale("log")
    else:
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_ylim(0)
    axes.set(xlabel="hidden size = input size", ylabel=quantity, title=title)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=150)
