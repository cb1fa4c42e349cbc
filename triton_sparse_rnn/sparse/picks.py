"""Picks: single weights in vectors, of each hidden unit of a unit group its own column within a bank of columns."""

from __future__ import annotations

import dataclasses
import numbers

from triton_sparse_rnn.sparse.patterns import Pattern

BANKS = (8, 16, 32, 64)
COLUMNS = (1, 2, 4)


@dataclasses.dataclass(frozen=True)
class Picks(Pattern):
    """Units of BR x BC weights: BR hidden units of one gate, BC weights of each, from its own columns of a bank.

    Attributes:
        rows: BR.
        bank: neighbouring columns out of which each row picks, one of BANKS.
        columns: BC, weights of a row in a unit, one of COLUMNS.
    """

    rows: int = 16
    bank: int = 32
    columns: int = 1

    def __post_init__(self) -> None:
        for name in ("rows", "bank", "columns"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, numbers.Integral):
                raise TypeError(f"{name} of Picks must be an integer, got {size!r}")
            object.__setattr__(self, name, int(size))  # a plain int, whatever integer came
        if self.rows < 1:
            raise ValueError(f"rows of Picks must be at least 1, got {self.rows}")
        for name, allowed in (("bank", BANKS), ("columns", COLUMNS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} of Picks must be one of {allowed}, got {getattr(self, name)}")

    @property
    def block_size(self) -> tuple[int, int]:
        return self.rows, self.columns


Picks.__abstractmethods__ = frozenset()  # until its methods are here
