"""Aligned plain text, for what must work without optional packages."""

from __future__ import annotations

from collections.abc import Sequence


def align(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    """Return one line per row, its cells padded to the width of their column.

    Args:
        rows: cells; a row may end early.
        right: indices of columns that are aligned to the right.

    >>> align([["name", "bytes"], ["weight", "12"]], right=[1])
    ['name    bytes', 'weight     12']
    """
    columns = max(map(len, rows), default=0)
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(columns)]
    return [
        "  ".join(cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) for i, cell in enumerate(row)).rstrip()
        for row in rows
    ]
