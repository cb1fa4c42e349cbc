"""Sparsity patterns: which weights of a matrix are pruned together, and so stored together.

What is pruned or kept as a whole, such as a block, is a *unit* (not a hidden unit; a unit group is BR of those). A
weight comes as [G, H, C], a matrix for each gate. Its mask and its scores hold a number for each unit: [G, unit groups,
...]; the axes behind these two are the pattern's own. In a mask or in scores for all gates alike, G is 1.
"""

from __future__ import annotations

import abc
import dataclasses
import numbers
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from triton_sparse_rnn.sparse.blocks import (
    VECTOR_ROWS,
    check_filling_up,
    count_blocks,
    expand_block_mask,
    to_blocks,
)

SCORES = ("max", "mean", "l2")
INDEX_BYTES = torch.int32.itemsize  # of a column, and of a start of a row of blocks
_SCALE_BYTES = torch.float32.itemsize


def check_score(score: str) -> str:
    """Return score, or raise ValueError unless it is one of SCORES."""
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(map(repr, SCORES))}, got {score!r}")
    return score


class Pattern(abc.ABC):
    """What everybody who prunes, counts or stores asks. A pattern is a frozen dataclass; checkpoints hold its repr.

    Attributes:
        follows_weights: whether it depends on the weights which of them a mask keeps.
        balanced: whether a `Pruner` that is not told prunes balanced.
    """

    follows_weights: ClassVar[bool] = False
    balanced: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def block_size(self) -> tuple[int, int]:
        """(BR, BC): a stored unit has the weights of BR hidden units, BC of each, filled up with zeros at an edge."""

    @abc.abstractmethod
    def describe(self, count: int | None = None) -> str:
        """Name so many units, or None for "block of 16x1", to put "no" or "a" before."""

    @abc.abstractmethod
    def check_size(self, rows: int, columns: int, where: str) -> None:
        """Raise ValueError where matrices [rows, columns] are too small for the pattern; `where` says what they are."""

    @abc.abstractmethod
    def mask_shape(self, gates: int, rows: int, columns: int) -> tuple[int, ...]:
        """The shape of a mask for `gates` matrices [rows, columns]."""

    @abc.abstractmethod
    def weight_counts(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """How many weights each unit of a matrix really has, less at its edges: int64, as the mask of one gate."""

    @abc.abstractmethod
    def kept(self, weight: Tensor) -> Tensor:
        """The mask of the units of a weight [G, H, C], of any dtype, that hold anything but zeros."""

    @abc.abstractmethod
    def scores(self, weight: Tensor, score: str) -> Tensor:
        """Score each unit of a weight: the lowest are pruned first.

        Args:
            weight: [G, H, C], floating point.
            score: "max" is the largest |w| (Narang et al. 2017), "mean" the mean |w| (as WaveRNN), "l2" the root of the
                sum of squares (as LPCNet), which favours a whole unit over one cut off at the edge.

        Returns:
            As a mask, float32 or wider ("l2" float64, where no square of a float32 vanishes), from 0 to infinity. A
            unit that holds NaN scores infinity: it is pruned last, and the fault stays in sight.
        """

    @abc.abstractmethod
    def norms(self, weight: Tensor) -> Tensor:
        """The l2 norm of each unit of a weight [G, H, C], as a mask. Its gradient at a unit of zeros is zero."""

    @abc.abstractmethod
    def spread(self, mask: Tensor, weight: Tensor, before: Tensor | None = None) -> Tensor:
        """A mask of all gates as one of the weights [G, H, C] themselves.

        Args:
            mask: as `mask_shape` has it, bool, True = kept.
            weight: of any dtype; which weights a mask keeps may depend on them.
            before: what this returned for a mask that kept more: what it prunes stays pruned. None prunes nothing.

        Returns:
            Contiguous, bool, True = kept.
        """

    @abc.abstractmethod
    def pruned_places(self, mask: Tensor, spread: Tensor, most: int) -> Tensor:
        """Find a few pruned weights, here and there.

        Args:
            mask: of all gates.
            spread: the same over the weights, [G, H, C]: False or 0 where they are pruned.
            most: how many.

        Returns:
            Flat indices [<= most] of weights, int64.
        """

    @abc.abstractmethod
    def in_whole_vectors(self) -> Pattern | None:
        """The like pattern that leaves no vector of VECTOR_ROWS partly empty; None if this one leaves none."""

    @property
    def products(self) -> int:
        """Multiply-accumulates with a stored unit, for one input vector."""
        return self.block_size[0] * self.block_size[1]

    @property
    def vectors(self) -> int:
        """The same in multiply-adds of VECTOR_ROWS numbers; a vector that is partly empty takes as long."""
        return self.block_size[1] * -(-self.block_size[0] // VECTOR_ROWS)

    def unit_bytes(self, itemsize: int) -> int:
        """Bytes of the values and indices of a stored unit, for weights of `itemsize` bytes."""
        return self.products * itemsize + INDEX_BYTES

    def stored_bytes(
        self, kept_units: int, gates: int, rows: int, columns: int, itemsize: int, *, scales: bool = False
    ) -> int:
        """Bytes of everything that a `BlockMatrix` holds.

        Args:
            kept_units: how many are stored.
            gates, rows, columns: G matrices [rows, columns].
            itemsize: bytes of a stored weight.
            scales: whether each row has one, as of int8.
        """
        starts = torch.Size(self.mask_shape(gates, rows, columns)[:2]).numel() + 1
        return kept_units * self.unit_bytes(itemsize) + starts * INDEX_BYTES + scales * gates * rows * _SCALE_BYTES

    def full_mask(self, gates: int, rows: int, columns: int) -> Tensor:
        """The mask of `gates` matrices [rows, columns] of which nothing is pruned, on the CPU."""
        return torch.ones(self.mask_shape(gates, rows, columns), dtype=torch.bool, device="cpu")

    def count_units(self, rows: int, columns: int, *, balanced: bool = False) -> int:
        """How many units are ranked together: those of a matrix [rows, columns], or with `balanced` of a unit group."""
        return torch.Size(self.mask_shape(1, rows, columns)[2 if balanced else 1 :]).numel()

    def pruned_weights(self, mask: Tensor, rows: int, columns: int) -> int:
        """How many weights of matrices [rows, columns] a mask of all gates prunes."""
        return int((self.weight_counts(rows, columns, mask.device) * ~mask).sum())

    def combine_gates(self, scores: Tensor, score: str) -> Tensor:
        """Score the units that lie over each other in all gates as one: [G, ...] -> [1, ...]."""
        if check_score(score) == "max":
            return scores.amax(0, keepdim=True)
        if score == "mean":
            return scores.mean(0, keepdim=True)
        return scores.square().sum(0, keepdim=True).sqrt()

    def prune_to_sparsity(self, scores: Tensor, kept: Tensor, sparsity: float, *, balanced: bool = False) -> Tensor:
        """Prune the round(sparsity * units) units with the lowest scores; of equal ones, those that come first.

        Args:
            scores: of one gate, none negative or NaN.
            kept: the mask so far, bool of the same shape. What it prunes counts as lowest and stays pruned.
            sparsity: in [0, 1).
            balanced: prune so many in each unit group, out of those that it has.

        Returns:
            The new mask, True = kept.

        >>> Blocks(1, 1).prune_to_sparsity(torch.tensor([[3.0, 1.0], [1.0, 2.0]]), torch.ones(2, 2).bool(), 0.25)
        tensor([[ True, False],
                [ True,  True]])
        """
        ranked = scores.masked_fill(~kept, -1.0)
        rows = ranked.flatten(1) if balanced else ranked.reshape(1, -1)
        return kept & ~lowest(rows, round(sparsity * rows.shape[-1])).view_as(kept)

    def prune_to_threshold(self, scores: Tensor, kept: Tensor, threshold: float) -> Tensor:
        """Prune the units whose score is at most `threshold`; arguments and result as for `prune_to_sparsity`."""
        return kept & (scores > threshold)


def lowest(rows: Tensor, count: int) -> Tensor:
    """Mark the `count` lowest of each row of [n, m], of equal ones those that come first: bool [n, m].

    >>> lowest(torch.tensor([[3, 1, 2, 1]]), 1)
    tensor([[False,  True, False, False]])
    """
    if count == 0:
        return torch.zeros_like(rows, dtype=torch.bool)
    # The same as a stable sort, in a seventh of the time.
    highest = rows.topk(count, dim=-1, largest=False, sorted=False).values.amax(-1, keepdim=True)
    below, level = rows < highest, rows == highest
    return below | (level & (level.cumsum(-1) <= count - below.sum(-1, keepdim=True)))


def some(mask: Tensor, most: int) -> Tensor:
    """Where up to `most` of the True entries of a mask are, taken evenly from all: int64 [<= most, axes]."""
    found = mask.nonzero()
    count = min(most, len(found))
    evenly = torch.arange(count, dtype=torch.int64, device=mask.device) * (len(found) - 1) // max(1, count - 1)
    return found[evenly]


PatternLike: TypeAlias = "Pattern | tuple[int, int]"


@dataclasses.dataclass(frozen=True)
class Blocks(Pattern):
    """Blocks of BR x BC weights: BR hidden units of one gate by BC inputs. Those at the edge of a gate may be smaller.

    A mask has an entry for each block: [G, block rows, block columns].

    Attributes:
        rows: BR.
        columns: BC.

    >>> Blocks(16, 1)
    Blocks(rows=16, columns=1)
    >>> Blocks(1, 2).scores(torch.tensor([[[3.0, -4.0, 1.0]]]), "mean")
    tensor([[[3.5000, 1.0000]]])
    """

    rows: int = 16
    columns: int = 1

    def __post_init__(self) -> None:
        sizes = _check_pair((self.rows, self.columns), "rows and columns of Blocks")
        for name, size in zip(("rows", "columns"), sizes, strict=True):
            object.__setattr__(self, name, size)  # a plain int, whatever integer came

    @property
    def block_size(self) -> tuple[int, int]:
        return self.rows, self.columns

    def describe(self, count: int | None = None) -> str:
        blocks = "block" if count is None else f"{count:,} block{'' if count == 1 else 's'}"
        return f"{blocks} of {self.rows}x{self.columns}"

    def check_size(self, rows: int, columns: int, where: str) -> None:
        check_filling_up(self.block_size, rows, columns, where, "pattern")

    def mask_shape(self, gates: int, rows: int, columns: int) -> tuple[int, ...]:
        return gates, *count_blocks(rows, columns, self.block_size)

    def weight_counts(self, rows: int, columns: int, device: torch.device) -> Tensor:
        heights, widths = (
            (size - torch.arange(0, size, block, dtype=torch.int64, device=device)).clamp(max=block)
            for size, block in zip((rows, columns), self.block_size, strict=True)
        )
        return heights[:, None] * widths

    def kept(self, weight: Tensor) -> Tensor:
        return to_blocks(weight.ne(0), self.block_size).flatten(-2).any(-1)

    def scores(self, weight: Tensor, score: str) -> Tensor:
        blocks = to_blocks(weight.to(torch.promote_types(weight.dtype, torch.float32)).abs(), self.block_size)
        if check_score(score) == "max":
            scores = blocks.amax((-2, -1))
        elif score == "mean":
            scores = blocks.sum((-2, -1)) / self.weight_counts(weight.shape[-2], weight.shape[-1], weight.device)
        else:
            scores = blocks.double().square().sum((-2, -1)).sqrt()
        return scores.nan_to_num(nan=torch.inf, posinf=torch.inf)

    def norms(self, weight: Tensor) -> Tensor:
        return torch.linalg.vector_norm(to_blocks(weight, self.block_size), dim=(-2, -1))

    def spread(self, mask: Tensor, weight: Tensor, before: Tensor | None = None) -> Tensor:
        return expand_block_mask(mask, self.block_size, weight.shape[-2], weight.shape[-1])

    def pruned_places(self, mask: Tensor, spread: Tensor, most: int) -> Tensor:
        gate, row, column = some(~mask, most).unbind(1)  # of each block its first weight
        return (gate * spread.shape[-2] + row * self.rows) * spread.shape[-1] + column * self.columns

    def in_whole_vectors(self) -> Blocks | None:
        return Blocks(VECTOR_ROWS, self.columns) if self.rows % VECTOR_ROWS else None


def as_pattern(pattern: PatternLike, name: str = "pattern") -> Pattern:
    """Return a pattern as it is, and a pair (rows, columns) as `Blocks`.

    Raises:
        TypeError, ValueError: naming the argument, for what is neither.
    """
    return pattern if isinstance(pattern, Pattern) else Blocks(*_check_pair(pattern, name))


def _check_pair(pair: tuple[int, int], name: str) -> tuple[int, int]:
    """Return a pair of positive integers, Python's or numpy's, as plain ints, or raise TypeError or ValueError."""
    given = tuple(pair) if isinstance(pair, (tuple, list, torch.Size)) else ()
    if len(given) != 2 or any(isinstance(n, bool) or not isinstance(n, numbers.Integral) for n in given):
        raise TypeError(f"{name} must be two integers (rows, columns), as in Blocks(16, 1), got {pair!r}")
    rows, columns = map(int, given)
    if min(rows, columns) < 1:
        raise ValueError(f"{name} must be at least (1, 1), got {pair!r}")
    return rows, columns
