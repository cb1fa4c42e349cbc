"""The pictures of a demo run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from triton_sparse_rnn.sparse.patterns import Pattern
from triton_sparse_rnn.sparse.picks import Picks

INK, PALE = "#1f2933", "#9aa5b1"
DENSE, SPARSE, BLOCKS = "#52606d", "#d9480f", "#1971c2"
KEPT = LinearSegmentedColormap.from_list("kept", ["#ffc078", "#f76707", "#862e0a", "#2b0f04"])
ENLARGED = 64  # rows and columns of the corner
SMOOTHING = 0.03  # of the steps, in the running mean


def plot_training(
    path: Path,
    losses: Mapping[str, Sequence[float]],
    sparsities: Sequence[float],
    held_out: Mapping[str, float],
    title: str,
) -> None:
    """Draw bits per character of all trainings over the sparsity of a pruned one.

    Args:
        losses: by kind, bits per character at every step.
        sparsities: of the model pruned in picks after every step, 0 to 1.
        held_out: by kind, bits per character on held-out text.
    """
    figure = new_figure(9, 6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.6, 1])
    labels = {"dense": "dense nn.GRU", "picks": "SparseGRU, pruned in picks", "blocks": "SparseGRU, pruned in blocks"}
    window = max(1, round(SMOOTHING * len(sparsities)))
    for kind, colour in (("dense", DENSE), ("blocks", BLOCKS), ("picks", SPARSE)):
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


def plot_mask(path: Path, weight: Tensor, gates: Sequence[str], pattern: Pattern, title: str) -> None:
    """Draw what is kept of a recurrent weight, gate by gate; above each gate, how many weights read each input.

    Beside them a corner of the first gate is drawn larger, with lines between unit groups, and between banks of columns
    where the pattern is picks: each row of a unit group keeps as many weights in a bank as the others, its own ones.

    Args:
        weight: [G * H, H], zero where it is pruned.
        gates: G names.
        pattern: in which it is pruned.
    """
    matrices = weight.detach().abs().unflatten(0, (len(gates), -1)).numpy()  # [G, H, H]
    H, rows = matrices.shape[1], pattern.block_size[0]
    bank = pattern.bank if isinstance(pattern, Picks) else None
    strongest = np.quantile(matrices[matrices > 0], 0.99) if (matrices > 0).any() else 1.0
    figure = new_figure(4.1 * (len(gates) + 1) + 0.8, 5.4)
    grid = figure.subplots(2, len(gates) + 1, height_ratios=[1, 7], squeeze=False)
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=11)
    for (above, axes), matrix, gate in zip(grid.T, matrices, gates, strict=False):
        kept = matrix != 0
        above.bar(np.arange(H), kept.sum(0), width=1.0, color=SPARSE, alpha=0.75)
        above.set(ylim=(0, max(1, int((matrices != 0).sum(1).max()))), xlim=(-0.5, H - 0.5))
        above.set_title(f"gate {gate}: {100 * kept.mean():.1f} % kept", color=INK, fontsize=10)
        above.tick_params(labelbottom=False, length=0, labelleft=above is grid[0, 0])
        _draw_matrix(axes, matrix, strongest)
        axes.tick_params(labelleft=axes is grid[1, 0])
        axes.set_xlabel("from hidden unit")
        strip(above)
        strip(axes)
    grid[0, 0].set_ylabel("readers")
    grid[1, 0].set_ylabel("to hidden unit")
    grid[0, -1].axis("off")
    axes = grid[1, -1]
    image = _draw_matrix(axes, matrices[0][:ENLARGED, :ENLARGED], strongest)
    side = min(ENLARGED, H)
    axes.set_yticks(*_named(side, rows, "group"))
    axes.hlines(np.arange(0, side, rows) - 0.5, -0.5, side - 0.5, color=INK, linewidth=0.7)
    if bank:
        axes.set_xticks(*_named(side, bank, "bank"))
        axes.vlines(np.arange(0, side, bank) - 0.5, -0.5, side - 0.5, color=INK, linewidth=0.7)
    axes.set_title(f"corner of gate {gates[0]}", color=INK, fontsize=10)
    strip(axes)
    bar = figure.colorbar(image, ax=grid[1, :].tolist(), fraction=0.02, pad=0.01)
    bar.set_label("|weight|", color=INK)
    bar.outline.set_visible(False)  # type: ignore[operator]
    figure.savefig(path)


def _named(side: int, size: int, name: str) -> tuple[list[float], list[str]]:
    """Middles and names of the stretches of `size` that cut 0..side."""
    starts = range(0, side, size)
    middles = [(start + min(start + size, side)) / 2 - 0.5 for start in starts]
    return middles, [f"{name} {i}" for i in range(len(starts))]


def _draw_matrix(axes: Axes, matrix: np.ndarray, strongest: float) -> AxesImage:
    kept = np.ma.masked_where(matrix == 0, matrix)
    return axes.imshow(kept, cmap=KEPT, vmin=0, vmax=strongest, interpolation="nearest", aspect="auto")


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
