"""Which backend runs the backward of a direction. One asked for by name runs or raises; None takes the fastest."""

from __future__ import annotations

from triton_sparse_rnn.gate_gradients.backends import cpu, reference, triton
from triton_sparse_rnn.gate_gradients.contract import BackwardBackend, BackwardDirection, Rule
from triton_sparse_rnn.ops.dispatch import choose, unavailable_reason

BACKWARDS: dict[str, BackwardBackend] = {"triton": triton, "cpu": cpu, "reference": reference}


def choose_backward(backend: str | None, direction: BackwardDirection, rule: Rule) -> BackwardBackend:
    """Return what runs the backward of a direction.

    Args:
        backend: one of BACKENDS, or None.
        direction, rule: what it is to run; the numbers in its tensors do not matter.

    Raises:
        ValueError: there is no backend of that name.
        BackendUnavailableError: `backend` is named and cannot run it.
    """

    def reason_of(name: str) -> str | None:
        return unavailable_reason(name) or BACKWARDS[name].unsupported_reason(direction, rule)

    return BACKWARDS[choose(backend, direction.x.device, reason_of, "the backward of this layer")]
