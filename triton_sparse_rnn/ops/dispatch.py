"""Which backend runs a layer. A backend asked for by name runs or raises; None takes the fastest that fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from triton_sparse_rnn.errors import BackendUnavailableError
from triton_sparse_rnn.ops.backends import cpu, reference, triton
from triton_sparse_rnn.ops.layer_weights import RunLayer, StoredLayer
from triton_sparse_rnn.ops.stored_linear import RunLinear, StoredLinear


class Backend(Protocol):
    """What a module of backends/ offers."""

    def availability(self) -> str | None:
        """Return why it cannot run in this process at all, or None where it can."""
        ...

    def unsupported_reason(self, layer: StoredLayer) -> str | None:
        """Return why it cannot run a layer, where `availability` is None, or None where it can."""
        ...

    def prepare_layer(self, layer: StoredLayer, num_threads: int) -> RunLayer:
        """Return a supported layer, ready to run."""
        ...

    def unsupported_linear_reason(self, layer: StoredLinear) -> str | None:
        """Return the same as `unsupported_reason` of a linear layer."""
        ...

    def prepare_linear(self, layer: StoredLinear, num_threads: int) -> RunLinear:
        """Return a supported linear layer, ready to run."""
        ...


BACKENDS: dict[str, Backend] = {"triton": triton, "cpu": cpu, "reference": reference}  # the fastest first


def check_backend(backend: str | None) -> str | None:
    """Return backend, or raise ValueError when there is none of that name."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    return backend


def unavailable_reason(backend: str) -> str | None:
    """Why a backend cannot run on this machine at all; None if it can."""
    return BACKENDS[backend].availability()


def unsupported_reason(backend: str, layer: StoredLayer) -> str | None:
    """Why a backend cannot run this layer here; None if it can."""
    return unavailable_reason(backend) or BACKENDS[backend].unsupported_reason(layer)


def choose_backend(backend: str | None, layer: StoredLayer) -> str:
    """Return the backend that runs this layer: one of BACKENDS, which may be named.

    Raises:
        ValueError: there is no backend of that name.
        BackendUnavailableError: `backend` is named and cannot run it.
    """
    return choose(backend, layer.device, lambda name: unsupported_reason(name, layer), "this layer")


def linear_reason(backend: str, layer: StoredLinear) -> str | None:
    """Why a backend cannot run this linear layer here; None if it can."""
    return unavailable_reason(backend) or BACKENDS[backend].unsupported_linear_reason(layer)


def choose_linear_backend(backend: str | None, layer: StoredLinear) -> str:
    """Return the backend that runs this linear layer; arguments and errors as of `choose_backend`."""
    return choose(backend, layer.device, lambda name: linear_reason(name, layer), "this layer")


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
        names = (name for name in BACKENDS if name != "triton" or device.type == "cuda")  # its interpreter only by name
        return next(name for name in names if reason_of(name) is None)
    assert backend is not None
    if (reason := reason_of(backend)) is not None:
        raise BackendUnavailableError(
            f"backend {backend!r} cannot run {what}: {reason}. backend=None takes the fastest one that can."
        )
    return backend
