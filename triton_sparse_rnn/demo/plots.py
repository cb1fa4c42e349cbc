"""The two pictures of a demo run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

INK, PALE = "#1f2933", "#9aa5b1"
DENSE, SPARSE = "#52606d", "#d9480f"
KEPT = LinearSegmentedColormap.from_list("kept", ["#ffc078", "#f76707", "#862e0a", "#2b0f04"])
SMOOTHING = 0.03  # of the steps, in the running mean


def plot_training(
    path: Path,
    losses: Mapping[str, Sequence[float]],
    sparsities: Sequence[float],
    held_out: Mapping[str, float],
    title: str,
) -> None:
    """Draw bits per character of both trainings over the sparsity of the pruned one.

    Args:
        losses: by kind, bits per character at every step.
        sparsities: of the sparse model after every step, 0 to 1.
        held_out: by kind, bits per character on held-out text.
    """
    figure = new_figure(9, 6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.6, 1])
    labels = {"dense": "dense nn.GRU", "sparse": "SparseGRU, pruned while it trains"}
    window = max(1, round(SMOOTHING * len(sparsities)))
    for kind, colour in (("dense", DENSE), ("sparse", SPARSE)):
        loss = np.asarray(losses[kind])
        steps = np.arange(1, len(loss) + 1)
        upper.plot(steps, loss, color=colour, alpha=0.13, linewidth=0.6)
        smooth = np.convolve(loss, np.full(window, 1 / window), mode="valid")
        label = f"{labels[kind]}: {held_out[kind]:.3f} on held-out text"
        upper.plot(steps[window - 1 :], smooth, color=colour, linewidth=1.8, label=label)
    tails = np.concatenate([np.asarray(loss)[len(loss) // 20 :] for loss in losses.values()])
    upper.set_ylim(0.95 * tails.min(), 1.02 * tails.max())
    upper.set_ylabel("bits per character, training")
    upper.legend(frameon=False, loc="upper right", labelcolor=INK)
    upper.set_title(title, loc="left", color=INK, fontsize=11)
    percent = 100 * np.asarray(sparsities)
    steps = np.arange(1, len(percent) + 1)
    lower.fill_between(steps, percent, step="post", color=SPARSE, alpha=0.18, linewidth=0)
    lower.step(steps, percent, where="post", color=SPARSE, linewidth=1.4)
    lower.annotate(f"{percent[-1]:.1f} %", (steps[-1], percent[-1]), (-4, -14), textcoords="offset points", ha="right")
    lower.set(ylim=(0, 100), xlim=(0, len(percent)), xlabel="optimizer step", ylabel="weights pruned, %")
    for axes in (upper, lower):
        strip(axes)
        axes.grid(axis="y", color=PALE, alpha=0.3, linewidth=0.6)
    figure.savefig(path)


def plot_mask(path: Path, weight: Tensor, gates: Sequence[str], block_size: tuple[int, int], title: str) -> None:
    """Draw what is kept of a recurrent weight, gate by gate; above each gate, how many weights read each input.

    Args:
        weight: [G * H, H], zero where it is pruned.
        gates: G names.
    """
    matrices = weight.detach().abs().unflatten(0, (len(gates), -1)).numpy()  # [G, H, H]
    figure = new_figure(4.1 * len(gates) + 0.8, 5.4)
    grid = figure.subplots(2, len(gates), height_ratios=[1, 7], sharex=True, sharey="row", squeeze=False)
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=11)
    strongest = np.quantile(matrices[matrices > 0], 0.99) if (matrices > 0).any() else 1.0
    image, H = None, matrices.shape[1]
    for (above, axes), matrix, gate in zip(grid.T, matrices, gates, strict=True):
        kept = matrix != 0
        above.bar(np.arange(H), kept.sum(0), width=1.0, color=SPARSE, alpha=0.75)
        above.set_title(f"gate {gate}: {100 * kept.mean():.1f} % kept", color=INK, fontsize=10)
        above.tick_params(labelbottom=False, length=0)
        image = axes.imshow(
            np.ma.masked_where(~kept, matrix),
            cmap=KEPT,
            vmin=0,
            vmax=strongest,
            interpolation="nearest",
            aspect="auto",
        )
        axes.set_xlabel("from hidden unit")
        strip(above)
        strip(axes)
    grid[0, 0].set_ylabel("readers")
    grid[1, 0].set_ylabel(f"to hidden unit (blocks of {block_size[0]} x {block_size[1]})")
    assert image is not None
    bar = figure.colorbar(image, ax=grid[1, :].tolist(), fraction=0.02, pad=0.01)
    bar.set_label("|weight|", color=INK)
    bar.outline.set_visible(False)  # type: ignore[operator]
    figure.savefig(path)


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of so many inches that can be saved without a display."""
    figure = Figure(figsize=(width, height), dpi=140, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def strip(axes: Axes) -> None:
    """Leave two thin spines, and numbers in INK."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)
    axes.tick_params(colors=INK, labelsize=9)
