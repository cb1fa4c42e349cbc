"""Which backend runs the backward of a direction. One asked for by name runs or raises; None takes the fastest."""

from __future__ import annotations

from triton_sparse_rnn.gate_gradients.backends import cpu, reference, triton
from triton_sparse_rnn.gate_gradients.contract import Backward, Direction, Rule
from triton_sparse_rnn.ops.dispatch import choose, unavailable_reason

DIRECTION_GRADIENTS: dict[str, Backward] = {
    "triton": triton.direction_gradients,
    "cpu": cpu.direction_gradients,
    "reference": reference.direction_gradients,
}


def unsupported_reason(backend: str, direction: Direction, rule: Rule) -> str | None:
    """Why a backend cannot run this backward here; None if it can."""
    if (reason := unavailable_reason(backend)) is not None:
        return reason
    if backend == "reference":
        return None
    return (triton if backend == "triton" else cpu).unsupported_reason(direction, rule)


def choose_backward(backend: str | None, direction: Direction, rule: Rule) -> Backward:
    """Return the backward of a direction.

    Args:
        backend: one of BACKENDS, or None.
        direction, rule: what it is to run; the numbers in its tensors do not matter.

    Raises:
        ValueError: there is no backend of that name.
        BackendUnavailableError: `backend` is named and cannot run it.
    """

    def reason_of(name: str) -> str | None:
        return unsupported_reason(name, direction, rule)

    chosen = choose(backend, direction.x.device, reason_of, "the backward of this layer")
    return DIRECTION_GRADIENTS["reference" if len(direction.x) == 0 else chosen]  # no kernel needs to know B = 0
