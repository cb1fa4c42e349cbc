"""How a layer's budget of units is shared out among its gates and weights, by what their units score.

The parts of a budget are the gates of weight_ih and weight_hh of one layer and direction. Their units are ranked
together, but each part keeps a floor of its own. Only how many units each part keeps is decided here; which ones is
left to the pattern.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from triton_sparse_rnn.sparse.patterns import lowest

SPLITS = ("gate", "layer")
FLOOR = 0.25  # of the share that an equal split would leave: at 90 % zeros, 2.5 % of a gate


def check_split(split: str) -> str:
    """Return split, or raise ValueError unless it is one of SPLITS."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(map(repr, SPLITS))}, got {split!r}")
    return split


def least_kept(units: int, sparsity: float) -> int:
    """How many of its units a part keeps, whatever they score: FLOOR of an equal split's share, at least one.

    >>> least_kept(400, 0.9), least_kept(4, 0.9), least_kept(0, 0.9)
    (10, 1, 0)
    """
    floor = math.ceil(FLOOR * (1 - sparsity) * units - 1e-9)  # 1 - 0.9 is not quite 0.1
    return min(units, max(1, floor))


def scheduled(sizes: Sequence[int], sparsity: float) -> int:
    """How many units parts of these sizes keep together as the schedule says, whatever their floors."""
    return sum(sizes) - round(sparsity * sum(sizes))


def root_mean_square(weight: Tensor) -> Tensor:
    """Of all entries of a weight, zeros among them: float64, above 0 unless the weight is zero or empty.

    NaN and infinity count as zeros, so that one such weight does not change what the others score relative to it.

    >>> root_mean_square(torch.tensor([[2.0, 0.0], [torch.nan, 0.0]])).item()
    1.0
    """
    if not weight.numel():
        return torch.zeros((), dtype=torch.float64, device=weight.device)
    values = weight.double().nan_to_num(0.0, 0.0, 0.0).flatten(1)  # a copy
    largest = values.abs().amax()  # no square of a float64 vanishes, or is infinite, in parts of it
    # Rows first, then their sums: the rounding of a sum in one go depends on the number of threads.
    squares = values.div_(largest.where(largest > 0, 1.0)).square_().sum(1).sum()
    return largest * (squares / weight.numel()).sqrt()


def share_out(scores: Sequence[Tensor], kept: Sequence[Tensor], sparsity: float) -> list[float]:
    """Split a budget: return the sparsity of each part, a count of units as a fraction.

    A part first keeps its floor, `least_kept`, then what ranks high among the others of all parts. Together they keep
    exactly what is scheduled, or if that is less than all floors, these; never more than is left now.

    Args:
        scores: of each part [rows, units], which parts can compare, none negative or NaN. Rows are pruned by the same
            number, and so ranked by the mean of what comes first, second, ... in each; all have equally many rows.
        kept: the masks so far, bool of the same shapes, as many True in each row of a part.
        sparsity: scheduled for all together, in [0, 1).

    >>> kept = [torch.ones(1, 4, dtype=torch.bool)] * 2
    >>> share_out([torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[0.0, 0.0, 0.0, 9.0]])], kept, 0.5)
    [0.25, 0.75]
    """
    sizes = [each.shape[-1] for each in scores]
    ranked = [_ranked(*both).to(scores[0].device) for both in zip(scores, kept, strict=True)]
    sure = [min(len(each), least_kept(size, sparsity)) for each, size in zip(ranked, sizes, strict=True)]
    rest = [each[count:] for each, count in zip(ranked, sure, strict=True)]
    pooled = torch.cat(rest)
    more = min(len(pooled), max(0, scheduled(sizes, sparsity) - sum(sure)))
    lost = lowest(pooled[None], len(pooled) - more)[0].split([len(each) for each in rest])
    losses = torch.stack([each.sum() for each in lost]).tolist()
    pruned = [size - len(each) + loss for size, each, loss in zip(sizes, ranked, losses, strict=True)]
    return [count / max(1, size) for count, size in zip(pruned, sizes, strict=True)]


def _ranked(scores: Tensor, kept: Tensor) -> Tensor:
    """What is left, the highest first: the mean over rows of [rows, units], 1-D."""
    left = int(kept.sum(1).amin()) if kept.numel() else 0
    return scores.masked_fill(~kept, -1.0).sort(dim=1, descending=True).values[:, :left].mean(0)
