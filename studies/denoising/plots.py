"""What pruning costs: SI-SDR over the share of zeros."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes

from studies.denoising.conversion import UNCONVERTED
from studies.denoising.rows import BLOCKS, DENSE, Row
from studies.denoising.speech import GROUPS
from studies.denoising.summary import Model, models_of
from studies.denoising.timing import ONNXRUNTIME
from studies.runs.figures import BLUE, GREEN, GREY, INK, ORANGE, PALE, legend_below, new_figure, strip
from studies.runs.records import Lines

# Who belongs to each line or set of points: colour, style and whether markers are filled.
FAMILIES: dict[str, tuple[str, str, bool, Callable[[Row], bool]]] = {
    "picks, taught": (ORANGE, "o-", True, lambda row: row.taught and not row.linear_too),
    "picks, not taught": (ORANGE, "o", False, lambda row: not row.taught and row.pattern != BLOCKS),
    "16x1 blocks": (BLUE, "s-", True, lambda row: row.pattern == BLOCKS and row.gradual and not row.linear_too),
    "16x1 blocks, in one go": (BLUE, "s", False, lambda row: not row.gradual),
    "picks, taught, linear layers too": (GREEN, "D", True, lambda row: row.linear_too and row.pattern != BLOCKS),
    "16x1 blocks, linear layers too": (GREEN, "D", False, lambda row: row.linear_too and row.pattern == BLOCKS),
}


def plot_quality(lines: Lines, folder: Path) -> list[Path]:
    """Write denoising.png, with a panel for each group of held-out recordings."""
    found = [model for model in models_of(lines) if model.form == UNCONVERTED]
    figure = new_figure(10.5, 4.4)
    panels = figure.subplots(1, len(GROUPS), sharex=True)
    for axes, group in zip(panels, GROUPS, strict=True):
        _draw(axes, found, group)
    panels[0].set_ylabel("SI-SDR, dB", color=INK)
    legend_below(figure, panels, 4)
    figure.savefig(folder / "denoising.png")
    return [folder / "denoising.png"]


def _draw(axes: Axes, found: list[Model], group: str) -> None:
    for model in found:
        spread = model.si_sdr[group]
        if model.row == DENSE:
            axes.axhline(spread.mean, color=INK, linewidth=1.2, label="fine-tuned, not pruned")
            axes.axhspan(spread.low, spread.high, color=INK, alpha=0.08, linewidth=0)
        elif model.label == ONNXRUNTIME:
            axes.axhline(spread.mean, color=GREY, linestyle="--", linewidth=1.2, label="original, as it came")
    pruned = [(model.row, model.si_sdr[group]) for model in found if model.row is not None and model.row != DENSE]
    for label, (colour, style, is_filled, belongs) in FAMILIES.items():
        points = sorted((100 * row.sparsity, *spread[:3]) for row, spread in pruned if belongs(row))
        if points:
            x, mean, low, high = zip(*points, strict=True)
            face = colour if is_filled else "white"
            axes.vlines(x, low, high, color=colour)
            axes.plot(x, mean, style, color=colour, markerfacecolor=face, markersize=6, label=label)
    axes.set_xlim(46, 99)
    axes.set_title(group, loc="left", color=INK, fontsize=11)
    axes.set_xlabel("zeros in the weights of the GRU, %", color=INK)
    axes.grid(axis="y", color=PALE, alpha=0.3, linewidth=0.6)
    strip(axes, labelsize=9)
