"""Sparsity patterns: which weights of a matrix are pruned together, and so stored together."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

from triton_sparse_rnn.sparse.blocks import check_block_size


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks of BR x BC weights: BR hidden units of one gate by BC inputs. Those at the edge of a gate may be smaller.

    Attributes:
        rows: BR.
        columns: BC.

    >>> Blocks(16, 1)
    Blocks(rows=16, columns=1)
    """

    rows: int = 16
    columns: int = 1

    def __post_init__(self) -> None:
        for name, size in zip(("rows", "columns"), check_block_size((self.rows, self.columns), "Blocks"), strict=True):
            object.__setattr__(self, name, size)  # a plain int, whatever integer came

    @property
    def block_size(self) -> tuple[int, int]:
        """(BR, BC)."""
        return self.rows, self.columns


Pattern: TypeAlias = Blocks
PatternLike: TypeAlias = "Pattern | tuple[int, int]"


def as_pattern(pattern: PatternLike, name: str = "pattern") -> Pattern:
    """Return a pattern as it is, and a pair (rows, columns) as `Blocks`.

    Raises:
        TypeError, ValueError: naming the argument, for what is neither.
    """
    return pattern if isinstance(pattern, Blocks) else Blocks(*check_block_size(pattern, name))
