"""From which sparsity on ours is the faster one, read off the rows of bench_break_even.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from bench.rows import BASELINES, Row, markdown

SUITE = "bench_break_even"


class Point(NamedTuple):
    """Medians at one sparsity, in microseconds."""

    sparsity: float
    ours: float
    other: float
    other_name: str


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table, a line for each of our contenders: against baseline and best float32 peer of a layer."""
    cells = []
    layers: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row.suite == SUITE and row.facts["precision"] == "float32":
            layers.setdefault((row.facts["cell"], row.facts["H"]), []).append(row)
    for (cell, H), layer_rows in layers.items():
        for ours in dict.fromkeys(row.contender for row in layer_rows if _is_ours(row)):
            baseline = break_even(_points(layer_rows, ours, lambda row: row.contender in BASELINES))
            peer = break_even(_points(layer_rows, ours, lambda row: not _is_ours(row)))
            cells.append([cell, str(H), ours, baseline, peer])
    headings = ["layer", "H", "contender", "as fast as the baseline from", "as fast as the best float32 peer from"]
    return markdown(headings, cells)


def break_even(points: Sequence[Point]) -> str:
    """Return the sparsity from which on ours is as fast at every point, and the name of whom it meets there.

    Points are in order of sparsity; "" if there are none. Times are straight lines between neighbouring points.

    >>> points = [Point(0.0, 20, 10, "peer"), Point(0.2, 15, 10, "peer"), Point(0.4, 5, 10, "peer")]
    >>> break_even(points)
    '30 % (peer)'
    """
    if not points:
        return ""
    slower = [i for i, point in enumerate(points) if point.ours > point.other]
    if not slower:
        return f"{100 * points[0].sparsity:.0f} % ({points[0].other_name}), the lowest measured"
    if slower[-1] == len(points) - 1:
        return f"above {100 * points[-1].sparsity:.0f} % ({points[-1].other_name})"
    below, above = points[slower[-1]], points[slower[-1] + 1]
    lag, lead = below.ours - below.other, above.other - above.ours
    sparsity = below.sparsity + (above.sparsity - below.sparsity) * lag / (lag + lead)
    return f"{100 * sparsity:.0f} % ({above.other_name})"


def _points(rows: Sequence[Row], contender: str, is_other: Callable[[Row], bool]) -> list[Point]:
    """A contender and the fastest of the others at each sparsity, in order."""
    ours = {row.facts["sparsity"]: row for row in rows if row.contender == contender}
    return [
        Point(sparsity, row.median_us, fastest.median_us, fastest.contender)
        for sparsity, row in sorted(ours.items())
        if (fastest := _fastest(other for other in rows if is_other(other) and other.facts["sparsity"] == sparsity))
    ]


def _is_ours(row: Row) -> bool:
    return row.contender.startswith("Persistent")


def _fastest(rows: Iterable[Row]) -> Row | None:
    return min(rows, key=lambda row: row.median_us, default=None)
