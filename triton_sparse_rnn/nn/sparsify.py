"""Turn the recurrent layers of an existing model into training modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn
from torch.nn import RNNBase

from triton_sparse_rnn.gate_gradients.layer import GateGradientLayer, check_gate_gradient
from triton_sparse_rnn.gate_gradients.options import GateGradientSparsity
from triton_sparse_rnn.names import clean_name
from triton_sparse_rnn.nn.cells import describe_cells
from triton_sparse_rnn.nn.instance_state import overriding_attributes
from triton_sparse_rnn.nn.replace import added_members, named_recurrent_layers
from triton_sparse_rnn.nn.training import classes_of
from triton_sparse_rnn.notices import warn

ModelT = TypeVar("ModelT", bound=nn.Module)


def sparsify(
    model: ModelT,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    gate_gradient: GateGradientSparsity | None = None,
) -> ModelT:
    """Make every nn.RNN, nn.GRU and nn.LSTM of `model` a SparseRNN, SparseGRU or SparseLSTM, in place.

    A layer stays the same object and only changes its class. So its parameters, buffers, hooks, flags and attributes,
    the optimizers, wrappers and lists that refer to it, and the layers that share it, all stay as they are. Training
    modules are left alone. A layer of a subclass changes only if the subclass adds no method or class attribute that
    would be lost; otherwise it is left, with a warning that names it. A parametrized layer is such a subclass.

    Args:
        model: any module; a recurrent layer by itself is changed too.
        filter_fn: called as filter_fn(layer, name) for every recurrent layer, False leaves it as it is. A shared layer
            is asked for once, by its first name; the name of `model` itself is "".
        gate_gradient: what becomes zero in backward, for every SparseGRU and SparseLSTM that filter_fn took, those that
            were so before too; each gets a copy of its own. nn.RNN has no gates. None leaves them as they are.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module, or `gate_gradient` not a GateGradientSparsity.
        ValueError: `model` has no training module afterwards among the layers that filter_fn took, or `gate_gradient`
            does not fit one of them, or fits none. It is unchanged.

    >>> model = nn.Sequential(nn.Embedding(10, 4), nn.GRU(4, 8))
    >>> sparsify(model)
    Sequential(
      (0): Embedding(10, 4)
      (1): SparseGRU(4, 8)
    )
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    check_gate_gradient(gate_gradient)
    layers = named_recurrent_layers(model)
    taken = {name: layer for name, layer in layers.items() if filter_fn is None or filter_fn(layer, name)}
    trained: list[tuple[RNNBase, type[RNNBase]]] = []
    left: list[str] = []
    for name, layer in taken.items():
        dense_class, training_class = classes_of(layer)
        lost = [] if isinstance(layer, training_class) else added_members(layer, dense_class)
        passed_by = gate_gradient is not None and "forward" in overriding_attributes(layer)
        if lost:
            left.append(f"'{clean_name(name)}' is a {type(layer).__name__}, which would lose {', '.join(lost)}")
        elif passed_by and not isinstance(layer, training_class):  # what it calls is torch's forward
            kind = type(layer).__name__
            own = "whose own forward, set on the layer itself, would pass it by"
            left.append(f"'{clean_name(name)}' is a {kind}, {own}")
        else:
            trained.append((layer, training_class))
    if not trained:
        refused = [f"{', '.join(map(repr, layers))}, all refused by filter_fn"] if layers and not left else []
        found = "; ".join([*left, *refused, *describe_cells(model)]) or "none"
        raise ValueError(
            f"model must hold an nn.RNN, nn.GRU or nn.LSTM to swap, got a {type(model).__name__} with {found}"
        )
    gated = [layer for layer, training_class in trained if issubclass(training_class, GateGradientLayer)]
    if gate_gradient is not None:
        _check_fits(gate_gradient, gated)
    for layer, training_class in trained:
        if not isinstance(layer, training_class):
            layer.__class__ = training_class
        if gate_gradient is not None and isinstance(layer, GateGradientLayer):
            layer.gate_gradient = gate_gradient
    if left:
        advice = "derive the class from SparseGRU and the like, or undo a parametrization or a forward of its own first"
        warn(f"sparsify left some layers as they are: {'; '.join(left)}; {advice}")
    return model


def _check_fits(gate_gradient: GateGradientSparsity, layers: list[RNNBase]) -> None:
    if not layers:
        raise ValueError("gate_gradient needs an nn.GRU or nn.LSTM among the layers taken; nn.RNN has no gates")
    for layer in layers:
        gate_gradient.check_layer(layer)
