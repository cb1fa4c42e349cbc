"""Whether a backward in which gate gradients became zero is right, so that its time means something."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from triton_sparse_rnn import SparseLSTM
from triton_sparse_rnn.gate_gradients.backends import reference
from triton_sparse_rnn.gate_gradients.contract import Arriving, BackwardDirection, Gradients

MOST_WARM_UPS, CLOSE_ENOUGH = 60, 0.02
LARGEST_DIFFERING = 1e-3  # share of the gate gradients
GRADIENTS = ("x", "h0", "c0", "weight_ih", "weight_hh", "bias_ih")


@torch.no_grad()
def assert_right(ours: Gradients, arguments: tuple[Any, ...], rounding: float) -> None:
    """Fail unless gradients are those of the reference in float64 that goes on from the same gate gradients.

    Of millions of gate gradients some are so near to a threshold, or to a random number, that rounding decides
    otherwise, and all before them in time would follow. So the reference takes over what became of each step, and of
    its own decisions few may differ.

    Args:
        ours: with the gate gradients (keep_gates).
        arguments: what `direction_gradients` was called with; see `contract.BackwardBackend`.
        rounding: the largest error of a gradient, relative to its norm; of a gate gradient ten times that, relative to
            the largest one of its step.
    """
    assert ours.gates is not None
    direction, arriving, *others = arguments
    gates, decide, differing = ours.gates.double(), reference.apply_rule, 0

    def take_over(exact: Tensor, first_row: int, *rule: Any) -> Tensor:
        nonlocal differing
        right, own = decide(exact, first_row, *rule), gates[first_row : first_row + len(exact)]
        differing += int(((own - right).abs() > 10 * rounding * right.abs().max()).sum())
        return own

    with mock.patch.object(reference, "apply_rule", take_over):
        exact = reference.direction_gradients(
            BackwardDirection(*map(_double, direction._replace(workspace=None))),
            Arriving(*map(_double, arriving)),
            *others,
        )
    share = differing / gates.numel()
    assert share < LARGEST_DIFFERING, f"{share:.1e} of the gate gradients are wrong, so there is nothing to time"
    for name in GRADIENTS:
        right = getattr(exact, name)
        error = (getattr(ours, name).double() - right).norm() / right.norm()
        assert error < rounding, f"the gradient of {name} is off by {error:.1e}, so there is nothing to time"


def settle(layer: SparseLSTM, x: Tensor, grad_y: Tensor, target: float) -> None:
    """Run passes until the share of zeros is near the target."""
    for _ in range(MOST_WARM_UPS):
        layer(x)[0].backward(grad_y)
        if abs(measured_zeros(layer) - target) < CLOSE_ENOUGH:
            return
    raise AssertionError(f"{measured_zeros(layer):.0%} zeros after {MOST_WARM_UPS} passes")


def measured_zeros(layer: nn.LSTM) -> float:
    """The share of zeros in the last backward, 0 for nn.LSTM's own."""
    if not isinstance(layer, SparseLSTM):
        return 0.0
    assert layer.gate_gradient_stats is not None
    shares = layer.gate_gradient_stats.zeros["l0"].values()
    return sum(shares) / len(shares)


def _double(field: Any) -> Any:
    return field.double() if isinstance(field, Tensor) and field.is_floating_point() else field
