"""Picks: single weights in vectors, of each hidden unit of a unit group its own column within a bank of columns.

In each bank of a row the weights are ranked by size, and BC of each row of a unit group that follow each other in that
order are a unit, wherever in the bank they stand. The units of a bank follow each other in a mask from the smallest to
the largest, so what is kept of a bank is always the end of it: its *count* of units says everything. A last bank of
fewer columns has fewer units, of which the first has fewer weights.
"""

from __future__ import annotations

import dataclasses
import numbers
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from triton_sparse_rnn.sparse.blocks import VECTOR_ROWS, check_filling_up, count_blocks, from_blocks, to_blocks
from triton_sparse_rnn.sparse.patterns import INDEX_BYTES, Pattern, check_score, lowest, some

BANKS = (8, 16, 32, 64)
COLUMNS = (1, 2, 4)
_PICK_BYTES = torch.uint8.itemsize
ENTRY_UNITS = 4  # the largest class of entries, in which units are stored (picked_storage.py)
_LARGEST = torch.iinfo(torch.int64).max


@dataclasses.dataclass(frozen=True)
class Picks(Pattern):
    """Units of BR x BC weights: BR hidden units of one gate, BC weights of each, from its own columns of a bank.

    What is stored runs as fast as `Blocks`, nearly, and keeps weights that are nearly as large as single ones chosen
    freely. A mask has an entry for each unit: [G, unit groups, units], bank after bank, and says how many weights each
    row keeps in each bank; `spread` finds which, the largest.

    Attributes:
        rows: BR.
        bank: neighbouring columns out of which each row picks, one of BANKS.
        columns: BC, weights of a row in a unit, one of COLUMNS.

    >>> weight = torch.tensor([[[1.0, -5.0, 2.0, 0.0], [7.0, 1.0, 0.0, 3.0]]])
    >>> pattern = Picks(rows=2, bank=8)
    >>> pattern.scores(weight, "max")
    tensor([[[0., 1., 3., 7.]]])
    >>> pattern.spread(torch.tensor([[[False, False, True, True]]]), weight)
    tensor([[[False,  True,  True, False],
             [ True, False, False,  True]]])
    """

    rows: int = 16
    bank: int = 32
    columns: int = 1
    follows_weights: ClassVar[bool] = True
    balanced: ClassVar[bool] = True

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

    def describe(self, count: int | None = None) -> str:
        units = "picked unit" if count is None else f"{count:,} picked unit{'' if count == 1 else 's'}"
        return f"{units} of {self.rows}x{self.columns} in {self.bank}"

    def check_size(self, rows: int, columns: int, where: str, name: str = "pattern") -> None:
        check_filling_up(self.block_size, rows, columns, where, name)

    def mask_shape(self, gates: int, rows: int, columns: int) -> tuple[int, ...]:
        return gates, *count_blocks(rows, columns, self.block_size)

    def weight_counts(self, rows: int, columns: int, device: torch.device) -> Tensor:
        heights = (rows - torch.arange(0, rows, self.rows, dtype=torch.int64, device=device)).clamp(max=self.rows)
        units = -(-columns // self.columns)
        widths = torch.full((units,), self.columns, dtype=torch.int64, device=device)
        first = max(0, units - 1) // self._per_bank * self._per_bank  # of the last bank, which alone can lack weights
        widths[first : first + 1] -= units * self.columns - columns  # no columns, no units
        return heights[:, None] * widths

    def kept(self, weight: Tensor) -> Tensor:
        most = to_blocks(weight.ne(0), self._bank_size).sum(-1).amax(-1)
        return self._mask(-(-most // self.columns), -(-weight.shape[-1] // self.columns))

    def scores(self, weight: Tensor, score: str) -> Tensor:
        units = self._units(_ascending(to_blocks(_sizes(weight), self._bank_size)))
        if check_score(score) == "max":
            return self._in_a_row(units.amax((-3, -1)), weight.shape[-1])
        if score == "mean":
            counts = self.weight_counts(weight.shape[-2], weight.shape[-1], weight.device)
            return self._in_a_row(units.sum((-3, -1)), weight.shape[-1]) / counts
        return self._in_a_row(units.double().square().sum((-3, -1)).sqrt(), weight.shape[-1])

    def norms(self, weight: Tensor) -> Tensor:
        units = self._units(to_blocks(weight.abs(), self._bank_size).sort(dim=-1).values)
        return self._in_a_row(torch.linalg.vector_norm(units, dim=(-3, -1)), weight.shape[-1])

    def spread(self, mask: Tensor, weight: Tensor, before: Tensor | None = None) -> Tensor:
        # Bits of floats from 0 are ordered as these are; 0 is left for what was pruned, and for places beyond an edge.
        sizes = _sizes(weight)
        keys = sizes.view(torch.int64 if sizes.dtype == torch.float64 else torch.int32) + 1
        if before is not None:
            keys = keys * before
        keys = to_blocks(keys, self._bank_size)
        pruned = (self.bank - self._counts(mask) * self.columns)[..., None, None].expand(*keys.shape[:-1], 1)
        highest = _ascending(keys).gather(-1, (pruned - 1).clamp(min=0)).masked_fill(pruned == 0, -1)  # all are above
        kept = keys > highest
        too_few = self.bank - pruned - kept.sum(-1, keepdim=True)
        if too_few.any():  # of equal ones the first are pruned
            level = keys == highest
            kept |= level & (level.cumsum(-1) > level.sum(-1, keepdim=True) - too_few)
        return from_blocks(kept, *weight.shape[-2:])

    def pruned_places(self, mask: Tensor, spread: Tensor, most: int) -> Tensor:
        gate, group, unit = some(~mask, most).unbind(1)
        rows, columns = spread.shape[-2:]
        bank, place, row = unit // self._per_bank, unit % self._per_bank, group * self.rows
        bank_columns = bank[:, None] * self.bank + torch.arange(self.bank, dtype=torch.int64, device=mask.device)
        pruned = spread[gate[:, None], row[:, None], bank_columns.clamp(max=columns - 1)].eq(0)
        # A row has pruned more than BC times `place` weights of this bank: take the one after so many.
        column = (pruned.cumsum(-1) > place[:, None] * self.columns).to(torch.uint8).argmax(-1)
        return (gate * rows + row) * columns + bank * self.bank + column

    def in_whole_vectors(self) -> Picks | None:
        return dataclasses.replace(self, rows=VECTOR_ROWS) if self.rows % VECTOR_ROWS else None

    def unit_bytes(self, itemsize: int) -> int:
        return super().unit_bytes(itemsize) + self.products * _PICK_BYTES

    def stored_bytes(
        self, kept_units: int, gates: int, rows: int, columns: int, itemsize: int, *, scales: bool = False
    ) -> int:
        more_starts = (ENTRY_UNITS - 1) * torch.Size(self.mask_shape(gates, rows, columns)[:2]).numel()
        as_blocks = super().stored_bytes(kept_units, gates, rows, columns, itemsize, scales=scales)
        return as_blocks + (more_starts + 1) * INDEX_BYTES  # and the size of a bank

    def count_units(self, rows: int, columns: int, *, balanced: bool = False) -> int:
        return super().count_units(rows, columns)  # those of a gate, balanced or not

    def prune_to_sparsity(self, scores: Tensor, kept: Tensor, sparsity: float, *, balanced: bool = False) -> Tensor:
        """As `Pattern` has it; with `balanced` unit groups keep as many, or one more, and so do the banks of each.

        The exact number of a gate is kept all the same, whatever was pruned before: each unit group, and in it each
        bank, first keeps its share, rounded down; then those follow that come next in each, by score, then all others.
        """
        count, (groups, units) = round(sparsity * scores.numel()), scores.shape
        if not balanced or count == 0:
            return self._ends(super().prune_to_sparsity(scores, kept, sparsity))
        share = (groups * units - count) // groups
        _, larger, in_bank = self._places(units, scores.device)
        of_bank = share * in_bank // units
        keys = _in_turn(scores, kept, larger < of_bank, larger == of_bank)
        sure, rest = ~lowest(keys, units - share), lowest(keys, units - share - 1)
        keys = _in_turn(scores, kept, sure, ~(sure | rest))
        return self._ends(kept & ~lowest(keys.view(1, -1), count).view_as(kept))

    def prune_to_threshold(self, scores: Tensor, kept: Tensor, threshold: float) -> Tensor:
        return self._ends(super().prune_to_threshold(scores, kept, threshold))

    @property
    def _bank_size(self) -> tuple[int, int]:
        return self.rows, self.bank

    @property
    def _per_bank(self) -> int:
        """Units of a whole bank."""
        return self.bank // self.columns

    def _units(self, banks: Tensor) -> Tensor:
        """View banks [..., BR, bank] of weights by size as units [..., BR, units of a bank, BC]."""
        return banks.unflatten(-1, (self._per_bank, self.columns))

    def _in_a_row(self, values: Tensor, columns: int) -> Tensor:
        """Of a value for each unit [..., banks, units of a bank] leave out those that a last bank of fewer lacks."""
        units = -(-columns // self.columns)
        first = (units - 1) // self._per_bank * self._per_bank
        flat = values.flatten(-2)
        lacking = flat.shape[-1] - units
        return torch.cat([flat[..., :first], flat[..., first + lacking :]], -1) if lacking else flat

    def _counts(self, mask: Tensor) -> Tensor:
        """How many units a mask [..., units] keeps of each bank: int64 [..., banks]."""
        whole = F.pad(mask, (0, -mask.shape[-1] % self._per_bank))
        return whole.unflatten(-1, (-1, self._per_bank)).sum(-1)

    def _places(self, units: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Of each unit its bank, how many units of the bank are larger, and how many there are: int64 [units]."""
        unit = torch.arange(units, dtype=torch.int64, device=device)
        bank = unit // self._per_bank
        in_bank = (units - bank * self._per_bank).clamp(max=self._per_bank)
        return bank, (bank * self._per_bank + in_bank - 1 - unit), in_bank

    def _mask(self, counts: Tensor, units: int) -> Tensor:
        """The mask [..., units] that keeps so many units of each bank: [..., banks]."""
        bank, larger, _ = self._places(units, counts.device)
        return larger < counts[..., bank]

    def _ends(self, mask: Tensor) -> Tensor:
        """The mask of as many units of each bank, the largest, where equal scores or rounding chose others."""
        return self._mask(self._counts(mask), mask.shape[-1])


def _in_turn(scores: Tensor, kept: Tensor, sure: Tensor, following: Tensor) -> Tensor:
    """Keys by which units are kept, the highest first, int64: sure ones, following ones and others, these by score.

    Args:
        scores: none negative or NaN.
        kept: False gives the lowest key.
        sure, following: bool.
    """
    bits = scores.double().view(torch.int64)  # ordered as the scores are, from 0
    keys = bits.where(following, bits - _LARGEST).masked_fill(sure, _LARGEST)
    return keys.masked_fill(~kept, -_LARGEST - 1)


DEFAULT_PATTERN = Picks()  # of whoever prunes


def _sizes(weight: Tensor) -> Tensor:
    """|w| in float32 or wider, of any dtype; NaN counts as infinity."""
    sizes = weight.to(torch.promote_types(weight.dtype, torch.float32)).abs()
    return sizes.nan_to_num(nan=torch.inf, posinf=torch.inf)


def _ascending(values: Tensor) -> Tensor:
    """Sort the last axis. On a CPU numpy needs an eighth of torch's time, since it moves no indices."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.detach().numpy(), axis=-1))
    return values.sort(dim=-1).values
