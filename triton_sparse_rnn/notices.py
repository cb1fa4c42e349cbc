"""Warnings that point at the user's line, and name the layer they are about."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from contextvars import ContextVar

_PASSED_OVER = ("triton_sparse_rnn.", "torch.nn.modules.", "torch.jit.")  # modules whose lines no user wrote
_layer_path: ContextVar[str] = ContextVar("layer_path", default="")


@contextlib.contextmanager
def about_layer(path: str) -> Iterator[None]:
    """Let `in_layer` name this layer of a model; "" is a layer by itself."""
    token = _layer_path.set(path)
    try:
        yield
    finally:
        _layer_path.reset(token)


def in_layer(name: str) -> str:
    """Return the path of a parameter, or of the layer itself if `name` is empty, in the model that is being converted.

    >>> in_layer("weight_ih_l0")
    'weight_ih_l0'
    >>> with about_layer("encoder.rnn"):
    ...     in_layer("weight_ih_l0")
    'encoder.rnn.weight_ih_l0'
    """
    return ".".join(filter(None, (_layer_path.get(), name)))


def warn(message: str) -> None:
    """Give a UserWarning at the nearest line outside of this package, of torch.nn and of torch.jit."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_PASSED_OVER):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
