"""Random directions of an LSTM and gradients that arrive at them, for the tests of kernels of gate gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from gpu_device import DEVICE
from torch import Tensor

from triton_sparse_rnn.gate_gradients.backends import reference, triton
from triton_sparse_rnn.gate_gradients.contract import (
    Arriving,
    BackwardDirection,
    Decision,
    Gradients,
    Needed,
    Rule,
    Steps,
)
from triton_sparse_rnn.gate_gradients.states import lstm_gates, rows_before
from triton_sparse_rnn.kernels.triton.exchange import INTERPRETED

ALL = Needed(x=True, weight_ih=True, weight_hh=True, bias=True, weight_hr=False)
SEED = 12345


class Layer:
    """A direction whose y, which backward takes as it is, is random too."""

    def __init__(
        self,
        H: int,
        batch_sizes: Sequence[int],
        *,
        I: int = 5,
        reverse: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape).to(DEVICE, dtype)

        N, B = sum(batch_sizes), batch_sizes[0]
        self.direction = BackwardDirection(
            mode="LSTM",
            steps=Steps(tuple(batch_sizes), reverse),
            x=random(N, I),
            y=random(N, H).tanh(),
            h0=random(B, H).tanh(),
            c0=random(B, H),
            weight_ih=random(4 * H, I) / I**0.5,
            weight_hh=random(4 * H, H) / H**0.5,
            bias_ih=random(4 * H) / 2,
            bias_hh=random(4 * H) / 2,
            weight_hr=None,
            workspace=None,
        )
        self.arriving = Arriving(random(N, H), random(B, H), random(B, H))

    def run(self, rule: Rule, thresholds: Sequence[float] | None, **options: Any) -> Gradients:
        """By the kernels; gate gradients are kept."""
        return self._by(triton.direction_gradients, self.direction, self.arriving, rule, thresholds, options)

    def exact(self, rule: Rule, thresholds: Sequence[float] | None) -> Gradients:
        """In float64."""
        wide = (_to(torch.float64, self.direction), _to(torch.float64, self.arriving))
        return self._by(reference.direction_gradients, *wide, rule, thresholds, {})

    def saturated(self) -> Tensor:
        """How many gradients of each gate [4] are 0 since the gate itself, in the layer's dtype, is 0, 1 or -1."""
        wide, dtype = _to(torch.float64, self.direction), self.direction.x.dtype
        gates = lstm_gates(wide, rows_before(wide.y, wide.h0, wide.steps))
        i, f, g, o = as_stored(gates, dtype).double().unbind(1)
        slopes = torch.stack([i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o)], dim=1)
        return (slopes == 0).sum((0, 2))

    def _by(self, backward: Any, direction: Any, arriving: Any, rule: Rule, thresholds: Any, options: Any) -> Gradients:
        theta = None if thresholds is None else torch.tensor(thresholds, device=DEVICE)
        seed = torch.tensor([SEED], device=DEVICE)
        settings = {"keep_gates": True, **options}
        needed = settings.pop("needed", ALL)
        return backward(direction, arriving, needed, Decision(rule, theta, seed, **settings))


def as_stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round as a kernel does that stores float32: to the nearest, but Triton's interpreter truncates to bfloat16."""
    if INTERPRETED and dtype == torch.bfloat16:
        values = (values.float().view(torch.int32) & -(1 << 16)).view(torch.float32)
    return values.to(dtype)


def _to(dtype: torch.dtype, tensors: Any) -> Any:
    return type(tensors)(*(value.to(dtype) if isinstance(value, Tensor) else value for value in tensors))


def assert_close(ours: Gradients, exact: Gradients, tolerance: float = 2e-5) -> None:
    """NaN and infinity are to be where they are in `exact`; zeros are to be counted alike."""
    assert ours.zeros.tolist() == exact.zeros.tolist()
    for name, our, right in zip(ours._fields, ours, exact, strict=True):
        assert (our is None) == (right is None), name
        if our is not None and right is not None:
            torch.testing.assert_close(
                our.double(),
                right.double(),
                rtol=tolerance,
                atol=tolerance,
                equal_nan=True,
                msg=lambda m, name=name: f"{name}: {m}",
            )
