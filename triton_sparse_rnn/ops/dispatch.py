"""Which backend runs a layer. A backend asked for by name runs or raises; None takes the fastest that fits."""

from __future__ import annotations

import torch

from triton_sparse_rnn.errors import BackendUnavailableError
from triton_sparse_rnn.ops import cpu, reference
from triton_sparse_rnn.ops.layer_weights import LayerWeights

BACKENDS = ("triton", "cpu", "reference")  # the fastest first


def check_backend(backend: str | None) -> str | None:
    """Return backend, or raise ValueError when there is none of that name."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    return backend


def unavailable_reason(backend: str) -> str | None:
    """Why a backend cannot run on this machine at all; None if it can."""
    if backend == "triton":
        return "this version has no Triton kernels yet"
    if backend == "cpu":
        from triton_sparse_rnn.kernels.cpu.support import availability

        return availability()
    return None


def unsupported_reason(
    backend: str, mode: str, dtype: torch.dtype, device: torch.device, directions: list[LayerWeights]
) -> str | None:
    """Why a backend cannot run this layer here; None if it can."""
    if (reason := unavailable_reason(backend)) is not None:
        return reason
    return cpu.unsupported_reason(mode, dtype, device, directions) if backend == "cpu" else None


def choose_backend(
    backend: str | None, mode: str, dtype: torch.dtype, device: torch.device, directions: list[LayerWeights]
) -> str:
    """Return the backend that runs this layer.

    Raises:
        ValueError: there is no backend of that name.
        BackendUnavailableError: `backend` is named and cannot run it.
    """
    if check_backend(backend) is None:
        return next(name for name in BACKENDS if unsupported_reason(name, mode, dtype, device, directions) is None)
    assert backend is not None
    if (reason := unsupported_reason(backend, mode, dtype, device, directions)) is not None:
        raise BackendUnavailableError(
            f"backend {backend!r} cannot run this layer: {reason}. backend=None takes the fastest one that can."
        )
    return backend


RUN_LAYER = {"cpu": cpu.recurrent_layer, "reference": reference.recurrent_layer}
