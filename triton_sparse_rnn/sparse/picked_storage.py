"""How picked units are stored: which column each weight stands in, and the order in which kernels read them.

    weight[row + r, columns[u] * bank + picks[u, c, r]] = values[u, c, r]

The units of a bank stand in *entries* of ENTRY_UNITS neighbours, and one of those that are left. In each row of blocks
all entries of 4 units come first, then those of 3, 2 and 1, each class by bank: a kernel runs loops of a fixed count,
and reads the inputs of a bank once for an entry. `starts` says where each class of each row of blocks begins. Example:
banks with 1, 6 and 4 units.

    class       4                        3    2        1
    columns     1 1 1 1  2 2 2 2              1 1      0
    starts      0                        8    8        10    (ends at 11)

Rows with fewer weights in a bank than others of their unit group are padded. A padded place holds 0 and repeats the
last column that its row reads in this bank; a row without a weight there repeats the first column of the row that has
the most.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from triton_sparse_rnn.sparse.blocks import to_blocks
from triton_sparse_rnn.sparse.bsr import rows_of_blocks, starts_of
from triton_sparse_rnn.sparse.picks import BANKS, COLUMNS, ENTRY_UNITS, Picks


class PickedUnits(NamedTuple):
    """Units in the order in which they are stored."""

    blocks: Tensor  # [NB, BR, BC], the weights, 0 where padded
    picks: Tensor  # [NB, BC, BR], uint8
    columns: Tensor  # [NB], int64, the bank
    starts: Tensor  # [rows of blocks * ENTRY_UNITS + 1], int64


def pick_units(weight: Tensor, pattern: Picks) -> PickedUnits:
    """Gather every weight other than zero of a weight [G, H, C]; units are padded where rows have fewer than others."""
    (BR, BC), bank = pattern.block_size, pattern.bank
    banks = to_blocks(weight, (BR, bank)).transpose(0, 1)  # [groups, G, banks, BR, bank]
    stored = banks.ne(0)
    counts = stored.sum(-1)  # [groups, G, banks, BR]
    units = -(-counts.amax(-1) // BC)  # [groups, G, banks]
    most = int(units.max()) if units.numel() else 0

    # For each row its columns, those stored first; then the places of the widest bank, filled as said above.
    order = (~stored).to(torch.uint8).argsort(dim=-1, stable=True)
    places = torch.arange(most * BC, dtype=torch.int64, device=weight.device).expand(*counts.shape, -1)
    is_padded = places >= counts.unsqueeze(-1)
    columns = order.gather(-1, places.minimum((counts - 1).clamp(min=0).unsqueeze(-1)))
    fullest = order[..., 0].gather(-1, counts.argmax(-1, keepdim=True)).unsqueeze(-1)
    columns = columns.where(counts.unsqueeze(-1) > 0, fullest)
    values = banks.gather(-1, columns).masked_fill_(is_padded, 0)

    is_unit = torch.arange(most, dtype=torch.int64, device=weight.device) < units.unsqueeze(-1)
    groups, gates = units.shape[:2]
    place = is_unit.nonzero()
    row, unit = place[:, 0] * gates + place[:, 1], place[:, 3]
    count = units[place[:, 0], place[:, 1], place[:, 2]]
    classes = row * ENTRY_UNITS + ENTRY_UNITS - _entry_sizes(unit, count)
    reordered = classes.argsort(stable=True)

    def in_order(numbers: Tensor) -> Tensor:
        """[groups, G, banks, BR, places] -> [NB, BR, BC]."""
        by_unit = numbers.unflatten(-1, (most, BC)).transpose(-3, -2)  # [groups, G, banks, most, BR, BC]
        return by_unit[is_unit][reordered]

    per_class = torch.zeros(groups * gates * ENTRY_UNITS, dtype=torch.int64, device=weight.device)
    per_class.index_add_(0, classes, torch.ones_like(classes))
    return PickedUnits(
        in_order(values),
        in_order(columns).to(torch.uint8).transpose(1, 2).contiguous(),
        place[:, 2][reordered],
        starts_of(per_class),
    )


def dense_places(picks: Tensor, columns: Tensor, bank: int) -> Tensor:
    """[NB, BC, BR], int64, the column of each stored weight."""
    return columns.long()[:, None, None] * bank + picks.long()


def check_sizes(bank: int, columns: int) -> None:
    """Raise ValueError unless there are picks of such a bank, with so many weights of a row in a unit."""
    if bank not in BANKS or columns not in COLUMNS:
        raise ValueError(f"bank must be one of {BANKS} beside 1, 2 or 4 columns of values, got {bank} and {columns}")


def check_order(picks: Tensor, columns: Tensor, starts: Tensor, bank: int, inputs: int) -> None:
    """Raise ValueError unless units stand in the order of `pick_units`, and every pick is a column that there is.

    Args:
        picks, columns, starts: of a `BlockMatrix`; starts rise from 0 to NB.
        bank: neighbouring columns in a bank.
        inputs: columns of the matrix.
    """
    sizes = ENTRY_UNITS - torch.arange(len(starts) - 1, dtype=torch.int64, device=starts.device) % ENTRY_UNITS
    counts = starts.diff().long()
    if (counts % sizes).any():
        raise ValueError(f"starts must count whole entries of {ENTRY_UNITS}, 3, 2 and 1 units")
    if len(columns) == 0:
        return
    banks = -(-inputs // bank)
    if not 0 <= columns.min() <= columns.max() < banks:
        raise ValueError(f"columns must lie in 0..{banks - 1}, the banks of {bank}")
    kind = rows_of_blocks(starts, len(columns))  # the class of each unit
    if ((kind * banks + columns).diff() < 0).any():
        raise ValueError("columns must ascend within each class of a row of blocks")
    if (dense_places(picks, columns, bank).amax((1, 2)) >= inputs).any() or picks.max() >= bank:
        raise ValueError(f"picks must be below {bank} and name one of the {inputs} columns")

    numbers, order = (kind // ENTRY_UNITS * banks + columns).sort(stable=True)  # bank by bank
    _, group, counts = numbers.unique_consecutive(return_inverse=True, return_counts=True)
    unit = torch.arange(len(columns), dtype=torch.int64, device=starts.device) - (counts.cumsum(0) - counts)[group]
    if (_entry_sizes(unit, counts[group]) != sizes[kind[order]]).any():
        raise ValueError(f"a bank must have entries of {ENTRY_UNITS} units and one of those that are left")
    by_row = picks[order].flatten(0, 1)
    same_bank = group[:, None].expand(picks.shape[:2]).flatten().diff() == 0
    if ((by_row[1:] < by_row[:-1]) & same_bank[:, None]).any():
        raise ValueError("picks must ascend within a bank")


def _entry_sizes(unit: Tensor, count: Tensor) -> Tensor:
    """How many units the entry has in which unit number `unit` stands, of a bank of `count`."""
    left = count % ENTRY_UNITS
    return left.masked_fill(unit < count - left, ENTRY_UNITS)
