"""A recurrent layer as a loop over time steps in torch, with the products left to the caller."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def run_time_loop(cell: str, projected: Tensor, recur: Callable[[Tensor], Tensor]) -> Tensor:
    """Run one layer from states of zeros.

    Args:
        cell: a key of CELLS.
        projected: W_ih x + b_ih of all steps, [T, B, G * H], gates in PyTorch's order.
        recur: takes h [B, H] to W_hh h + b_hh [B, G * H].
    Returns:
        y [T, B, H].
    """
    advance, gates, states = CELLS[cell]
    B, GH = projected.shape[1:]
    state = [projected.new_zeros(B, GH // gates) for _ in range(states)]
    outputs = []
    for p in projected.unbind():
        state = advance(p, recur(state[0]), *state)
        outputs.append(state[0])
    return torch.stack(outputs)


def _gru(p: Tensor, a: Tensor, h: Tensor) -> list[Tensor]:
    H = h.shape[1]
    r, z = (p[:, : 2 * H] + a[:, : 2 * H]).sigmoid_().chunk(2, dim=1)
    n = torch.addcmul(p[:, 2 * H :], r, a[:, 2 * H :]).tanh_()
    return [torch.lerp(n, h, z)]


def _lstm(p: Tensor, a: Tensor, h: Tensor, c: Tensor) -> list[Tensor]:
    i, f, g, o = (p + a).chunk(4, dim=1)
    c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
    return [o.sigmoid() * c.tanh(), c]


def _tanh(p: Tensor, a: Tensor, h: Tensor) -> list[Tensor]:
    return [(p + a).tanh_()]


def _relu(p: Tensor, a: Tensor, h: Tensor) -> list[Tensor]:
    return [(p + a).relu_()]


CELLS = {"GRU": (_gru, 3, 1), "LSTM": (_lstm, 4, 2), "RNN_TANH": (_tanh, 1, 1), "RNN_RELU": (_relu, 1, 1)}
