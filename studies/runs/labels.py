"""Labels beside the points of a plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

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
