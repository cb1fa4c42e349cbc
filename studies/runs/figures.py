"""How the pictures of all studies look: axes, points with the range of their seeds, and labels beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from studies.runs.spread import Spread

S = TypeVar("S")
INK, PALE = "#1f2933", "#9aa5b1"
GREY, ORANGE, BLUE, GREEN = "#52606d", "#d9480f", "#1c7ed6", "#2f9e44"

PLACES = [  # of a label beside its point: offset in points, side of the text that is there
    (9, 0, "left"), (-9, 0, "right"), (6, 10, "left"), (6, -10, "left"), (-6, 10, "right"), (-6, -10, "right"),
    (0, 12, "center"), (0, -12, "center"), (9, 20, "left"), (9, -20, "left"), (-9, 20, "right"), (-9, -20, "right"),
]  # fmt: skip
POINT_PIXELS = 14  # width of a marker


class Label(NamedTuple):
    """What is written beside the point (x, y)."""

    text: str
    x: float
    y: float
    colour: str


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of so many inches that can be saved without a display."""
    figure = Figure(figsize=(width, height), dpi=140, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def strip(axes: Axes, labelsize: int = 8) -> None:
    """Leave two thin spines, and numbers in INK."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)
    axes.tick_params(colors=INK, labelsize=labelsize)


def legend_below(figure: Figure, panels: Iterable[Axes], columns: int) -> None:
    """Write what stands for what in any of the panels, each once."""
    entries = {text: handle for axes in panels for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        entries.values(), entries.keys(), frameon=False, fontsize=9, loc="outside lower center", ncols=columns
    )


def plot_side_by_side(
    parts: Sequence[S], draw: Callable[[Axes, S], Sequence[Label]], size: tuple[float, float], columns: int, path: Path
) -> None:
    """Draw a panel for each part, and the labels that `draw` returns where there is room for them.

    Args:
        size: of a panel, in inches.
        columns: of the legend.
    """
    figure = new_figure(size[0] * len(parts), size[1])
    panels = figure.subplots(1, len(parts), squeeze=False)[0]
    labels = [draw(axes, part) for axes, part in zip(panels, parts, strict=True)]
    legend_below(figure, panels, columns)
    figure.draw_without_rendering()  # now the panels have their places
    for axes, own in zip(panels, labels, strict=True):
        place_labels(axes, own)
    figure.savefig(path)


def draw_points(
    axes: Axes, x: Sequence[float], spreads: Sequence[Spread], *, colour: str, marker: str, label: str
) -> None:
    """Draw means, with a bar from the lowest to the highest seed."""
    errors = np.array([(spread.mean - spread.low, spread.high - spread.mean) for spread in spreads]).T
    y = [spread.mean for spread in spreads]
    axes.errorbar(x, y, errors, color=colour, linestyle="none", capsize=3)
    axes.plot(x, y, color=colour, marker=marker, markersize=6, linestyle="none", label=label)


def place_labels(axes: Axes, labels: Sequence[Label]) -> None:
    """Write labels beside their points, each where it covers the least of points and earlier labels."""
    taken: list[Bbox] = []
    for _, x, y, _ in labels:
        left, bottom = axes.transData.transform((x, y)) - POINT_PIXELS / 2
        taken.append(Bbox.from_bounds(left, bottom, POINT_PIXELS, POINT_PIXELS))
    for text, x, y, colour in sorted(labels, key=lambda label: -label[2]):
        best, least = None, np.inf
        for dx, dy, side in PLACES:
            note = axes.annotate(
                text, (x, y), (dx, dy), textcoords="offset points", ha=side, va="center", fontsize=8, color=colour
            )
            box = note.get_window_extent()
            outside = _area(box) - _area(Bbox.intersection(box, axes.bbox))
            covered = outside + sum(_area(Bbox.intersection(box, other)) for other in taken)
            if covered < least:
                best, worse, least = note, best, covered
            else:
                worse = note
            if worse is not None:
                worse.remove()
        assert best is not None
        taken.append(best.get_window_extent())


def _area(box: Bbox | None) -> float:
    return 0.0 if box is None else box.width * box.height
