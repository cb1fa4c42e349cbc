"""Which backend runs a layer. A backend asked for by name runs or raises; None takes the fastest that fits."""

from __future__ import annotations

from collections.abc import Callable

import torch

from triton_sparse_rnn.errors import BackendUnavailableError
from triton_sparse_rnn.ops import cpu, reference, triton
from triton_sparse_rnn.ops.layer_weights import LayerWeights, RunLayer

BACKENDS = ("triton", "cpu", "reference")  # the fastest first


def check_backend(backend: str | None) -> str | None:
    """Return backend, or raise ValueError when there is none of that name."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    return backend


def unavailable_reason(backend: str) -> str | None:
    """Why a backend cannot run on this machine at all; None if it can."""
    if backend == "triton":
        return triton.availability()
    if backend == "cpu":
        from triton_sparse_rnn.kernels.cpu.support import availability

        return availability()
    return None


def unsupported_reason(
    backend: str,
    mode: str,
    dtype: torch.dtype,
    device: torch.device,
    directions: list[LayerWeights],
    activation_dtype: torch.dtype | None = None,
) -> str | None:
    """Why a backend cannot run this layer here; None if it can."""
    if (reason := unavailable_reason(backend)) is not None:
        return reason
    if backend == "reference":
        return None
    twin = triton if backend == "triton" else cpu
    return twin.unsupported_reason(mode, dtype, device, directions, activation_dtype)


def choose_backend(
    backend: str | None,
    mode: str,
    dtype: torch.dtype,
    device: torch.device,
    directions: list[LayerWeights],
    activation_dtype: torch.dtype | None = None,
) -> str:
    """Return the backend that runs this layer.

    Args:
        backend: one of BACKENDS, or None.
        mode: nn.RNNBase.mode.
        dtype, device: of inputs and biases.
        directions: the weights of each direction.
        activation_dtype: torch.int8 for activations that are quantised, or None.

    Raises:
        ValueError: there is no backend of that name.
        BackendUnavailableError: `backend` is named and cannot run it.
    """

    def reason_of(name: str) -> str | None:
        return unsupported_reason(name, mode, dtype, device, directions, activation_dtype)

    return choose(backend, device, reason_of, "this layer")


def choose(backend: str | None, device: torch.device, reason_of: Callable[[str], str | None], what: str) -> str:
    """Return `backend` if it can run something, or for None the fastest that can.

    Args:
        backend: one of BACKENDS, or None.
        device: of the tensors.
        reason_of: why a backend cannot run it, or None.
        what: it is, for the error.

    Raises:
        ValueError, BackendUnavailableError: see `choose_backend`.
    """
    if check_backend(backend) is None:
        fitting = BACKENDS if device.type == "cuda" else BACKENDS[1:]  # Triton's interpreter is taken only by name
        return next(name for name in fitting if reason_of(name) is None)
    assert backend is not None
    if (reason := reason_of(backend)) is not None:
        raise BackendUnavailableError(
            f"backend {backend!r} cannot run {what}: {reason}. backend=None takes the fastest one that can."
        )
    return backend


# prepare_layer(mode, directions, *, dtype, activation_dtype, num_threads) -> RunLayer, for a layer that is supported.
PREPARE_LAYER: dict[str, Callable[..., RunLayer]] = {
    "triton": triton.prepare_layer,
    "cpu": cpu.prepare_layer,
    "reference": reference.prepare_layer,
}
