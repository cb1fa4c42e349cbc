"""Several seeds taken together, and tables of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """Values of several seeds."""

    mean: float
    low: float
    high: float
    seeds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """None of no values."""
        values = list(values)
        return cls(statistics.fmean(values), min(values), max(values), len(values)) if values else None

    @classmethod
    def by_key(cls, values: Iterable[Mapping[str, float]]) -> dict[str, Spread]:
        """Take together what has the same key, which every mapping has."""
        first, *others = values
        return {key: spread for key in first if (spread := cls.of(one[key] for one in (first, *others)))}

    def text(self, digits: int, *, sign: bool = False) -> str:
        """Return the mean and, of several seeds, the range in brackets.

        >>> Spread.of([1.0, 2.0, 6.0]).text(1)
        '3.0 (1.0 to 6.0)'
        >>> Spread.of([0.25]).text(2, sign=True)
        '+0.25'
        """
        mean, low, high = (f"{value:{'+' if sign else ''}.{digits}f}" for value in self[:3])
        return mean if self.seeds == 1 else f"{mean} ({low} to {high})"


def markdown(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [headings, ["---"] * len(headings), *cells])


def thinned(values: Sequence[float], count: int) -> list[float]:
    """Return up to `count` means over equal stretches.

    >>> thinned([1, 2, 3, 4], 2)
    [1.5, 3.5]
    """
    count = min(count, len(values))
    bounds = [round(k * len(values) / count) for k in range(count + 1)]
    return [statistics.fmean(values[bounds[k] : bounds[k + 1]]) for k in range(count)]
