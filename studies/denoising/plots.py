"""What pruning costs: SI-SDR over the share of zeros."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes

from studies.denoising.conversion import UNCONVERTED
from studies.denoising.rows import DENSE
from studies.denoising.speech import GROUPS
from studies.denoising.summary import Model, models_of
from studies.denoising.timing import ONNXRUNTIME
from studies.runs.figures import BLUE, GREEN, GREY, INK, ORANGE, PALE, legend_below, new_figure, strip
from studies.runs.records import Lines


def plot_quality(lines: Lines, folder: Path) -> list[Path]:
    """Write denoising.png, with a panel for each group of held-out recordings."""
    found = [model for model in models_of(lines) if model.form == UNCONVERTED]
    figure = new_figure(10.5, 4.2)
    panels = figure.subplots(1, len(GROUPS), sharex=True)
    for axes, group in zip(panels, GROUPS, strict=True):
        _draw(axes, found, group)
    panels[0].set_ylabel("SI-SDR, dB", color=INK)
    legend_below(figure, panels, 3)
    figure.savefig(folder / "denoising.png")
    return [folder / "denoising.png"]


def _draw(axes: Axes, found: list[Model], group: str) -> None:
    lines = {"noisy speech": (PALE, ":"), ONNXRUNTIME: (GREY, "--")}
    for model in found:
        if model.label in lines:
            colour, style = lines[model.label]
            label = "original, as it came" if model.label == ONNXRUNTIME else model.label
            axes.axhline(model.quality[group].mean, color=colour, linestyle=style, linewidth=1.2, label=label)
    rows = [(model.row, model.quality[group]) for model in found if model.row is not None]
    families = {
        "pruned gradually while it is fine-tuned": (ORANGE, "o-", lambda row: row.gradual and not row.linear_too),
        "pruned in one go, then fine-tuned": (BLUE, "s", lambda row: not row.gradual),
        "gradually, linear layers too": (GREEN, "D", lambda row: row.linear_too),
    }
    for label, (colour, style, belongs) in families.items():
        points = sorted((100 * row.sparsity, *spread[:3]) for row, spread in rows if belongs(row))
        if points:
            x, mean, low, high = zip(*points, strict=True)
            axes.plot(x, mean, style, color=colour, markersize=6, label=label)
            axes.vlines(x, low, high, color=colour)
    dense = next((spread for row, spread in rows if row == DENSE), None)
    if dense is not None:
        axes.plot(0, dense.mean, "o", color=GREY, markersize=7, label="fine-tuned, not pruned")
    axes.set_xlim(-4, 100)
    axes.set_title(group, loc="left", color=INK, fontsize=11)
    axes.set_xlabel("zeros in the weights of the GRU, %", color=INK)
    axes.grid(axis="y", color=PALE, alpha=0.3, linewidth=0.6)
    strip(axes, labelsize=9)
