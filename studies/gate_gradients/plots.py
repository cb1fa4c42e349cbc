"""Two pictures: what zeros cost against what they save, and the sizes of gate gradients, which explain it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from studies.gate_gradients.distribution import BINS, GATES, HIGHEST, LOWEST, SMALLEST, threshold_for
from studies.gate_gradients.rows import CALIBRATION_SEED, DENSE
from studies.gate_gradients.summary import GateSection, rows_of
from studies.gate_gradients.training import calibrated_thresholds
from studies.runs.figures import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PALE,
    Label,
    draw_points,
    legend_below,
    new_figure,
    plot_side_by_side,
    strip,
)
from studies.runs.records import Key, Lines

STYLES = {  # by family: colour, marker
    "deterministic": (BLUE, "o"),
    "stochastic": (ORANGE, "D"),
    "fixed threshold": ("#74838f", "s"),
    "with dense steps": ("#4dabf7", "^"),
    "structured": (GREEN, "v"),
    "other": ("#862e9c", "x"),
}
DRAWN_TARGET = 0.8  # whose thresholds are drawn into the distribution
THRESHOLDS = {"deterministic": "-", "stochastic": "--", "fixed threshold": ":"}  # by family: line


def plot_all(lines: Lines, folder: Path) -> list[Path]:
    """Write gate-gradients-trade-off.png, and gate-gradients-TASK.png for each task with a dense run."""
    found = rows_of(lines)
    paths = [folder / "gate-gradients-trade-off.png"]
    plot_side_by_side(found, _draw_trade_off, (6.4, 5.6), 4, paths[0])
    for section in found:
        dense = lines.runs.get(Key(section.task, DENSE.name, CALIBRATION_SEED, section.steps))
        if dense is not None and dense["distribution"]:
            several = sum(other.task == section.task for other in found) > 1
            name = f"{section.task}-{section.steps}" if several else section.task
            paths.append(folder / f"gate-gradients-{name}.png")
            plot_distribution(section, dense, paths[-1])
    return paths


def _draw_trade_off(axes: Axes, section: GateSection) -> list[Label]:
    """Draw each row's difference to dense training over the multiply-accumulates that its zeros make redundant.

    Returns:
        What is to be written beside the points.
    """
    metric = section.metrics[0]
    dense = next((row.quality[metric.key] for row in section.models if row.name == DENSE.name), None)
    if dense is not None and dense.seeds > 1:
        label = f"dense, {dense.seeds} seeds: range about their mean"
        axes.axhspan(dense.low - dense.mean, dense.high - dense.mean, color=PALE, alpha=0.25, linewidth=0, label=label)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.axvline(50, color=PALE, linewidth=0.8, linestyle=":", label="papers: over 50 % at no loss")
    labels: list[Label] = []
    for family, (colour, marker) in STYLES.items():
        rows = sorted((row for row in section.models if row.family == family), key=lambda row: row.redundant["rnn"])
        points = [(row, spread) for row in rows if (spread := row.minus_dense[metric.key]) is not None]
        if not points:
            continue
        x, spreads = [100 * row.redundant["rnn"] for row, _ in points], [spread for _, spread in points]
        draw_points(axes, x, spreads, colour=colour, marker=marker, label=family)
        labels += [Label(row.label, at, s.mean, colour) for at, (row, s) in zip(x, points, strict=True)]
    axes.margins(x=0.15, y=0.1)
    axes.set_xlabel("redundant multiply-accumulates of the LSTM's training step, %", color=INK)
    axes.set_ylabel(f"{metric.heading}, minus dense", color=INK)
    above = axes.secondary_xaxis("top", functions=(lambda x: np.multiply(x, 1.5), lambda x: np.divide(x, 1.5)))
    above.set_xlabel("zero gate gradients, %", color=INK, fontsize=9)
    above.tick_params(colors=INK, labelsize=8)
    axes.set_title(section.title, loc="left", color=INK, fontsize=11)
    strip(axes)
    return labels


def plot_distribution(section: GateSection, dense: dict[str, Any], path: Path) -> None:
    """Draw the sizes of a dense run's gate gradients, gate by gate, early and late, with thresholds.

    Sizes are in units of what arrives at their own direction, a fixed threshold in those of all directions together.
    """
    figure = new_figure(3.3 * len(GATES), 5.6)
    grid = figure.subplots(len(dense["distribution"]), len(GATES), sharex=True, sharey=True, squeeze=False)
    fixed = calibrated_thresholds(dense, 1.0)[DRAWN_TARGET]  # of the loss itself, as the distribution is
    for line, (moment, found) in zip(grid, dense["distribution"].items(), strict=True):
        for axes, gate in zip(line, GATES, strict=True):
            _draw_gate(axes, found["gates"][gate], np.log10(fixed / found["size"]))
        line[0].set_ylabel(f"{moment}: step {found['step'] + 1:,} of {section.steps:,}\nshare, %")
    for axes, gate in zip(grid[0], GATES, strict=True):
        axes.set_title(f"gate {gate}", color=INK, fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("log10( |gate gradient| / rms of arriving gradient )", color=INK, fontsize=8)
    axes = grid[0, 0]
    axes.set_xlim(*_window(dense["distribution"]))
    axes.set_ylim(0, 1.35 * axes.get_ylim()[1])
    legend_below(figure, [axes], len(axes.get_legend_handles_labels()[1]))
    figure.suptitle(f"Gate gradients of dense training: {section.task}", x=0.01, ha="left", color=INK, fontsize=11)
    figure.savefig(path)


def _draw_gate(axes: Axes, gate: dict[str, Any], fixed: float) -> None:
    counts = np.asarray(gate["counts"], dtype=float)
    edges = np.linspace(LOWEST, HIGHEST, BINS + 1)
    energy = counts * 10 ** (edges[:-1] + edges[1:])
    total = counts.sum() + gate["zeros"]
    axes.stairs(100 * counts / total, edges, fill=True, color=PALE, alpha=0.5, label="gate gradients")
    axes.stairs(100 * energy / energy.sum(), edges, color=INK, linewidth=1.1, label="their squares")
    ends = {
        "deterministic": threshold_for(DRAWN_TARGET, gate, stochastic=False),
        "stochastic": threshold_for(DRAWN_TARGET, gate, stochastic=True),
        "fixed threshold": fixed,
    }
    for family, dashes in THRESHOLDS.items():
        label = f"threshold: {'fixed' if family == 'fixed threshold' else family}, {100 * DRAWN_TARGET:g} %"
        axes.axvline(ends[family], color=STYLES[family][0], linestyle=dashes, linewidth=1.5, label=label)
    text = f"smallest {100 * SMALLEST:g} % hold\n{100 * gate['energy']:.1f} % of squares"
    axes.text(0.03, 0.97, text, transform=axes.transAxes, va="top", fontsize=8, color=INK)
    strip(axes)


def _window(distribution: Mapping[str, Any]) -> tuple[float, float]:
    """The range of log10 sizes that holds nearly all, in every panel."""
    edges = np.linspace(LOWEST, HIGHEST, BINS + 1)
    lows, highs = [], []
    for found in distribution.values():
        for gate in found["gates"].values():
            below = np.cumsum(gate["counts"]) / max(1, sum(gate["counts"]))
            lows.append(edges[np.searchsorted(below, 0.02)])
            highs.append(edges[1:][min(np.searchsorted(below, 1 - 1e-5), BINS - 1)])
    return min(lows), max(highs) + 0.5
