"""What forward computed and did not leave: the gates of every step, again, from inputs and outputs.

All states of a layer but c are in its output, so the gates are two products over all rows at once. Products are taken
in the dtype of the layer; all else is float32, or float64 in a float64 layer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from triton_sparse_rnn.gate_gradients.contract import BackwardDirection, Steps
from triton_sparse_rnn.sparse.layer_config import GATES


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and pointwise functions."""
    return torch.promote_types(dtype, torch.float32)


def rows_before(states: Tensor, initial: Tensor, steps: Steps) -> Tensor:
    """Return the state before every step.

    Args:
        states: [N, size], after every step.
        initial: [B, size]. Where rows end before others, a reverse direction starts each from it at its own last step.
        steps: which rows belong to which step.
    Returns:
        [N, size].
    """
    B = steps.batch_sizes[0]
    if not steps.is_ragged:
        return torch.cat([states[B:], initial] if steps.reverse else [initial, states[: len(states) - B]])
    starts, sizes = steps.starts, steps.batch_sizes
    if not steps.reverse:
        kept = [states[first : first + size] for first, size in zip(starts, sizes[1:], strict=False)]
        return torch.cat([initial, *kept])
    parts = []
    for first, size, before in zip([*starts[1:], len(states)], [*sizes[1:], 0], sizes, strict=True):
        parts += [states[first : first + size], initial[size:before]]
    return torch.cat(parts)


def lstm_gates(direction: BackwardDirection, h_before: Tensor) -> Tensor:
    """Return i, f, g, o of every step, [N, 4, H]."""
    from_x, from_h = _gate_sums(direction, h_before)
    i, f, g, o = (from_x + from_h).unbind(1)
    return torch.stack([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], dim=1)


def lstm_cells(gates: Tensor, c0: Tensor, steps: Steps) -> Tensor:
    """Return c after every step, [N, H], from `lstm_gates`."""
    i, f, g, _ = gates.unbind(1)
    added = i * g
    cells = torch.empty_like(added)
    c = c0.to(gates.dtype, copy=True)
    for first, size in steps.ranges:
        rows = slice(first, first + size)
        c[:size] = f[rows] * c[:size] + added[rows]
        cells[rows] = c[:size]
    return cells


def gru_gates(direction: BackwardDirection, h_before: Tensor) -> tuple[Tensor, Tensor]:
    """Return r, z, n of every step, [N, 3, H], and what r multiplies, W_hn h + b_hn, [N, H]."""
    from_x, from_h = _gate_sums(direction, h_before)
    r, z = (from_x[:, :2] + from_h[:, :2]).sigmoid().unbind(1)
    n = (from_x[:, 2] + r * from_h[:, 2]).tanh()
    return torch.stack([r, z, n], dim=1), from_h[:, 2]


def _gate_sums(direction: BackwardDirection, h_before: Tensor) -> tuple[Tensor, Tensor]:
    """W_ih x + b_ih and W_hh h + b_hh, each [N, G, H]."""
    wide, G = wide_dtype(direction.x.dtype), GATES[direction.mode]
    H = direction.weight_hh.shape[0] // G
    from_x = F.linear(direction.x, direction.weight_ih, direction.bias_ih)
    from_h = F.linear(h_before, direction.weight_hh, direction.bias_hh)
    return from_x.to(wide).view(-1, G, H), from_h.to(wide).view(-1, G, H)
