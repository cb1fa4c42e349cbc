"""Thresholds that follow the size of the gradients that arrive at a layer, and where they start."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_sparse_rnn.gate_gradients.backends.reference import group_sizes
from triton_sparse_rnn.gate_gradients.contract import Arriving, Rule, Steps

LOWEST, HIGHEST = -40.0, 20.0  # of a threshold's logarithm: exp() and what it is multiplied by stay within float32
_HALVINGS = 28  # (HIGHEST - LOWEST) / 2^28 is less than float32 tells apart
_ENOUGH = 1 << 20  # sizes that tell a share well


def arriving_scale(arriving: Arriving) -> Tensor:
    """Return the root of the mean square of what arrives per row and output, [], float32: sqrt(sum g^2 / (N R)).

    What arrives at the final states is summed with the rest. Gradients times 2^k give it times 2^k, to the bit, while
    squares stay within float32.
    """
    dtype = torch.promote_types(arriving.y.dtype, torch.float32)
    norms = [torch.linalg.vector_norm(part, dtype=dtype) for part in arriving if part is not None]
    return (torch.linalg.vector_norm(torch.stack(norms)) * max(arriving.y.numel(), 1) ** -0.5).float()


def fitting_log_thresholds(gates: Tensor, steps: Steps, rule: Rule, scale: Tensor, target: float) -> Tensor:
    """Return s by which thresholds exp(s) * scale are expected to zero a share `target`; nothing waits for the device.

    Args:
        gates: [N, G, H], gate gradients of a dense backward; of many a part is looked at.
        steps: of the rows.
        rule: "small" or "sample".
        scale: [], float32, finite and above 0; else what returns has no meaning.
        target: 0 to 1.

    Returns:
        [G] for elements, [1] for blocks; float32, from LOWEST to HIGHEST.
    """
    if rule.group == "elements":
        stride = gates[:, 0].numel() // _ENOUGH * 2 + 1  # odd, for the most common batch sizes are even
        sizes = gates[::stride].abs().float().transpose(0, 1).flatten(1)
    else:
        sizes = group_sizes(gates, steps, rule).float().view(1, -1)
    sizes = torch.nan_to_num(sizes / scale, nan=torch.inf, posinf=torch.inf)
    low, high = sizes.new_full(sizes.shape[:1], LOWEST), sizes.new_full(sizes.shape[:1], HIGHEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        threshold = middle.exp().unsqueeze(1)
        zero = sizes < threshold if rule.selection == "small" else (1 - sizes / threshold).clamp_(min=0)
        too_few = zero.float().mean(1) < target
        low, high = torch.where(too_few, middle, low), torch.where(too_few, high, middle)
    return (low + high) / 2
