"""How much a block matters: the lowest scores are pruned first."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_sparse_rnn.sparse.blocks import to_blocks

SCORES = ("max", "mean", "l2")


def check_score(score: str) -> str:
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(map(repr, SCORES))}, got {score!r}")
    return score


def block_scores(weight: Tensor, block_size: tuple[int, int], score: str) -> Tensor:
    """Score every block of a stacked weight.

    Args:
        weight: [G, H, C], floating point; no block reaches from one gate into the next.
        block_size: (BR, BC). An edge block counts the weights it really has.
        score: "max" is the largest |w| (Narang et al. 2017), "mean" the mean |w| (as WaveRNN), "l2" the root of the
            sum of squares (as LPCNet), which favours a whole block over one cut off at the edge.

    Returns:
        [G, ceil(H / BR), ceil(C / BC)], float32 or wider ("l2" float64, where no square of a float32 vanishes), from 0
        to infinity. A block that holds NaN scores infinity: it is pruned last, and the fault stays in sight.

    >>> block_scores(torch.tensor([[[3.0, -4.0, 1.0]]]), (1, 2), "mean")
    tensor([[[3.5000, 1.0000]]])
    """
    blocks = to_blocks(weight.to(torch.promote_types(weight.dtype, torch.float32)).abs(), block_size)
    if check_score(score) == "max":
        scores = blocks.amax((-2, -1))
    elif score == "mean":
        scores = blocks.sum((-2, -1)) / block_weight_counts(
            (weight.shape[-2], weight.shape[-1]), block_size, weight.device
        )
    else:
        scores = blocks.double().square().sum((-2, -1)).sqrt()
    return scores.nan_to_num(nan=torch.inf, posinf=torch.inf)


def combine_gates(scores: Tensor, score: str) -> Tensor:
    """Score blocks that lie over each other in all gates as one block: [G, rows, columns] -> [1, rows, columns]."""
    if check_score(score) == "max":
        return scores.amax(0, keepdim=True)
    if score == "mean":
        return scores.mean(0, keepdim=True)
    return scores.square().sum(0, keepdim=True).sqrt()


def block_weight_counts(shape: tuple[int, int], block_size: tuple[int, int], device: torch.device) -> Tensor:
    """How many weights each block of a matrix [R, C] really has: [block rows, block columns], int64."""
    heights, widths = (
        (size - torch.arange(0, size, block, dtype=torch.int64, device=device)).clamp(max=block)
        for size, block in zip(shape, block_size, strict=True)
    )
    return heights[:, None] * widths
