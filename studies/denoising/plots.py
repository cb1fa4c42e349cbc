"""What pruning costs: SI-SDR over the share of zeros."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes

from studies.denoising.conversion import UNCONVERTED
from studies.denoising.rows import DENSE
from studies.denoising.speech import GROUPS
from studies.denoising.summary import Model, Runs, models
from studies.denoising.timing import ONNXRUNTIME
from triton_sparse_rnn.demo.plots import DENSE as DENSE_COLOUR
from triton_sparse_rnn.demo.plots import INK, PALE, SPARSE, new_figure, strip

ONE_GO, LINEAR = "#1c7ed6", "#2f9e44"


def plot_quality(runs: Runs, path: Path) -> None:
    """Draw a panel for each group of held-out recordings."""
    found = [model for model in models(runs) if model.form == UNCONVERTED]
    figure = new_figure(10.5, 4.2)
    panels = figure.subplots(1, len(GROUPS), sharex=True)
    for axes, group in zip(panels, GROUPS, strict=True):
        _draw(axes, found, group)
    panels[0].set_ylabel("SI-SDR, dB", color=INK)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside lower center", ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw(axes: Axes, found: list[Model], group: str) -> None:
    lines = {"noisy speech": (PALE, ":"), ONNXRUNTIME: (DENSE_COLOUR, "--")}
    for model in found:
        if model.label in lines:
            colour, style = lines[model.label]
            label = "original, as it came" if model.label == ONNXRUNTIME else model.label
            axes.axhline(model.quality[group].mean, color=colour, linestyle=style, linewidth=1.2, label=label)
    rows = [(model.row, model.quality[group]) for model in found if model.row is not None]
    families = {
        "pruned gradually while it is fine-tuned": (SPARSE, "o-", lambda row: row.gradual and not row.linear_too),
        "pruned in one go, then fine-tuned": (ONE_GO, "s", lambda row: not row.gradual),
        "gradually, linear layers too": (LINEAR, "D", lambda row: row.linear_too),
    }
    for label, (colour, style, belongs) in families.items():
        points = sorted((100 * row.sparsity, *spread[:3]) for row, spread in rows if belongs(row))
        if points:
            x, mean, low, high = zip(*points, strict=True)
            axes.plot(x, mean, style, color=colour, markersize=6, label=label)
            axes.vlines(x, low, high, color=colour)
    dense = next((spread for row, spread in rows if row == DENSE), None)
    if dense is not None:
        axes.plot(0, dense.mean, "o", color=DENSE_COLOUR, markersize=7, label="fine-tuned, not pruned")
    axes.set_xlim(-4, 100)
    axes.set_title(group, loc="left", color=INK, fontsize=11)
    axes.set_xlabel("zeros in the weights of the GRU, %", color=INK)
    axes.grid(axis="y", color=PALE, alpha=0.3, linewidth=0.6)
    strip(axes)
