"""Turn the recurrent layers of an existing model into training modules."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

from torch import nn
from torch.nn import RNNBase

from triton_sparse_rnn.nn.replace import added_members, named_recurrent_layers
from triton_sparse_rnn.nn.training import TRAINING_CLASSES

ModelT = TypeVar("ModelT", bound=nn.Module)


def sparsify(model: ModelT, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> ModelT:
    """Make every nn.RNN, nn.GRU and nn.LSTM of `model` a SparseRNN, SparseGRU or SparseLSTM, in place.

    A layer stays the same object and only changes its class. So its parameters, buffers, hooks, flags and attributes,
    the optimizers, wrappers and lists that refer to it, and the layers that share it, all stay as they are. Training
    modules are left alone. A layer of a subclass changes only if the subclass adds no method or class attribute that
    would be lost; otherwise it is left, with a warning that names it. A parametrized layer is such a subclass.

    Args:
        model: any module; a recurrent layer by itself is changed too.
        filter_fn: called as filter_fn(layer, name) for every recurrent layer, False leaves it as it is. A shared layer
            is asked for once, by its first name; the name of `model` itself is "".

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `model` has no training module afterwards among the layers that filter_fn took. It is unchanged.

    >>> model = nn.Sequential(nn.Embedding(10, 4), nn.GRU(4, 8))
    >>> sparsify(model)
    Sequential(
      (0): Embedding(10, 4)
      (1): SparseGRU(4, 8)
    )
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    layers = named_recurrent_layers(model)
    taken = {name: layer for name, layer in layers.items() if filter_fn is None or filter_fn(layer, name)}
    left: list[str] = []
    for name, layer in taken.items():
        dense_class, training_class = _classes(layer)
        if isinstance(layer, training_class):
            continue
        if lost := added_members(layer, dense_class):
            left.append(f"'{name}' is a {type(layer).__name__}, which would lose {', '.join(lost)}")
        else:
            layer.__class__ = training_class
    if len(left) == len(taken):
        found = "; ".join(left) or (f"{', '.join(map(repr, layers))}, all refused by filter_fn" if layers else "none")
        raise ValueError(
            f"model must hold an nn.RNN, nn.GRU or nn.LSTM to swap, got a {type(model).__name__} with {found}"
        )
    if left:
        advice = "derive the class from SparseGRU and the like, or undo a parametrization first"
        warnings.warn(f"sparsify left some layers as they are: {'; '.join(left)}; {advice}", stacklevel=2)
    return model


def _classes(layer: RNNBase) -> tuple[type[RNNBase], type[RNNBase]]:
    """The dense class that `layer` is an instance of, and the training class for it."""
    return next((dense, training) for dense, training in TRAINING_CLASSES.items() if isinstance(layer, dense))
