"""How large the gate gradients of a dense LSTM are: what a threshold has to choose among.

Sizes are |v| / s, where s is the root mean square of the gradient that arrives at the layer's outputs, as in the
controller of GateGradientSparsity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import LSTM

from triton_sparse_rnn.gate_gradients.backends.reference import direction_gradients
from triton_sparse_rnn.gate_gradients.contract import Arriving, BackwardDirection, Decision, Needed, Rule, Steps
from triton_sparse_rnn.gate_gradients.thresholds import arriving_scale

GATES = "ifgo"
LOWEST, HIGHEST, BINS = -10.0, 2.0, 120  # of log10(|v| / s); what is outside counts in the first or last bin
SMALLEST = 0.8  # share of the gate gradients whose part of the energy is told
NOTHING = Needed(x=False, weight_ih=False, weight_hh=False, bias=False, weight_hr=False)


class Probe:
    """Listens to one forward and backward of an LSTM of one layer, called with [T, B, I], and changes nothing.

    Make it before the forward; after the backward, and before the weights change, call `read`.
    """

    def __init__(self, rnn: LSTM) -> None:
        if rnn.num_layers != 1 or rnn.batch_first or rnn.proj_size:
            raise ValueError(f"a probe reads an LSTM of one layer, without batch_first and proj_size, got {rnn}")
        self.rnn = rnn
        self.arrived: dict[str, Tensor] = {}  # gradients of y, h_n and c_n, where anything was made of these
        self.handle = rnn.register_forward_hook(self._listen)

    def _listen(self, rnn: object, arguments: tuple[Any, ...], output: tuple[Tensor, tuple[Tensor, Tensor]]) -> None:
        self.x, (self.y, states) = arguments[0].detach(), output
        given = arguments[1] if len(arguments) > 1 else None
        self.states = [state.detach() for state in given] if given else [torch.zeros_like(state) for state in states]
        for name, tensor in zip("yhc", (self.y, *states), strict=True):
            tensor.register_hook(lambda gradient, name=name: self.arrived.__setitem__(name, gradient))

    @torch.no_grad()
    def read(self) -> tuple[Tensor, Tensor]:
        """Return the gate gradients [D, N, 4, H] and the size s of what arrived, [D]."""
        self.handle.remove()
        H, y = self.rnn.hidden_size, self.y.detach()
        grad_y = self.arrived.get("y", torch.zeros_like(y))
        gates, sizes = [], []
        for d, suffix in enumerate(("", "_reverse") if self.rnn.bidirectional else ("",)):
            h0, c0 = (state[d] for state in self.states)
            own = slice(d * H, (d + 1) * H)
            direction = BackwardDirection(
                "LSTM",
                Steps((y.shape[1],) * len(y), reverse=bool(d)),
                self.x.flatten(0, 1),
                y[..., own].flatten(0, 1),
                h0,
                c0,
                *(getattr(self.rnn, f"{name}_l0{suffix}").detach() for name in ("weight_ih", "weight_hh")),
                *(getattr(self.rnn, f"{name}_l0{suffix}", None) for name in ("bias_ih", "bias_hh")),
                weight_hr=None,
                workspace=None,
            )
            at_end = (self.arrived[name][d] if name in self.arrived else torch.zeros_like(h0) for name in "hc")
            arriving = Arriving(grad_y[..., own].flatten(0, 1), *at_end)
            decision = Decision(Rule(), None, torch.zeros(1, dtype=torch.int64), keep_gates=True)
            gradients = direction_gradients(direction, arriving, NOTHING, decision)
            assert gradients.gates is not None
            gates.append(gradients.gates)
            sizes.append(arriving_scale(arriving))
        return torch.stack(gates), torch.stack(sizes)


def describe(gates: Tensor, sizes: Tensor, quantiles: Sequence[float]) -> dict[str, Any]:
    """Return what JSON takes of the gate gradients [D, N, 4, H] and sizes [D] of a `Probe`.

    Returns:
        size: s, over all directions.
        quantiles: of |v| over all gates, not divided by s, by their share as text.
        gates: for each, `counts` of log10(|v| / s) in BINS from LOWEST to HIGHEST, `zeros` that are exactly 0, and
            `energy`: the part of the sum of squares that the smallest SMALLEST of them hold.
    """
    ordered = gates.abs().flatten().sort().values
    last = len(ordered) - 1
    return {
        "size": float(sizes.square().mean().sqrt()),
        "quantiles": {str(share): float(ordered[round(share * last)]) for share in quantiles},
        "gates": {
            gate: _describe_gate((values / sizes[:, None, None]).abs().flatten())
            for gate, values in zip(GATES, gates.unbind(2), strict=True)
        },
    }


def _describe_gate(values: Tensor) -> dict[str, Any]:
    logs = values[values > 0].log10().clamp(LOWEST, HIGHEST)
    energy = values.double().square().sort().values
    return {
        "counts": torch.histc(logs, BINS, LOWEST, HIGHEST).long().tolist(),
        "zeros": int((values == 0).sum()),
        "energy": float(energy[: round(SMALLEST * len(energy))].sum() / energy.sum().clamp(min=1e-300)),
    }


def bin_middles() -> list[float]:
    """Return log10(|v| / s) in the middle of every bin."""
    return [LOWEST + (k + 0.5) * (HIGHEST - LOWEST) / BINS for k in range(BINS)]


def threshold_for(target: float, gate: dict[str, Any], *, stochastic: bool) -> float:
    """Return log10 of the threshold, in units of s, that makes a share of the gate gradients in a histogram zero.

    The stochastic rule zeroes v below a threshold with probability 1 - v / threshold. Exact to a bin's width.

    >>> gate = {"counts": [0] * 60 + [10] * 10 + [0] * 50, "zeros": 0}
    >>> round(threshold_for(0.8, gate, stochastic=False), 3), round(threshold_for(0.8, gate, stochastic=True), 3)
    (-3.2, -2.71)
    """
    counts = torch.tensor(gate["counts"], dtype=torch.float64)
    total = counts.sum() + gate["zeros"]
    sizes = 10 ** torch.tensor(bin_middles(), dtype=torch.float64)

    def zeros(log_threshold: float) -> float:
        if stochastic:
            removed = (counts * (1 - sizes / 10**log_threshold).clamp(min=0)).sum()
        else:
            below = (log_threshold - LOWEST) * BINS / (HIGHEST - LOWEST)
            removed = (counts * (below - torch.arange(BINS)).clamp(0, 1)).sum()
        return float((removed + gate["zeros"]) / total)

    low, high = LOWEST, HIGHEST - math.log10(max(1e-6, 1 - target))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if zeros(middle) < target else (low, middle)
    return high
