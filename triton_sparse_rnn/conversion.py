"""Whole models: the training modules in, the persistent modules out, and back."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import RNNBase

from triton_sparse_rnn.nn.cells import CELL_ADVICE, describe_cells
from triton_sparse_rnn.nn.computed_weights import lost_members
from triton_sparse_rnn.nn.persistent import PersistentLayer
from triton_sparse_rnn.nn.persistent_classes import persistent_class
from triton_sparse_rnn.nn.replace import added_members, copy_with_replacements, named_recurrent_layers, take_hooks
from triton_sparse_rnn.nn.sparsify import sparsify
from triton_sparse_rnn.nn.training import TRAINING_CLASSES, classes_of
from triton_sparse_rnn.notices import about_layer, warn

__all__ = ["sparsify", "to_dense", "to_sparse"]

ModelT = TypeVar("ModelT", bound=nn.Module)


def to_sparse(
    model: nn.Module,
    *,
    weight_dtype: torch.dtype | None = None,
    block_size: tuple[int, int] | None = None,
    backend: str | None = None,
    activation_dtype: torch.dtype | None = None,
    num_threads: int = 1,
) -> Any:  # a module; of a class whose annotations do not know that its layers have other classes now
    """Return a model whose recurrent layers run from block-sparse weights, for inference.

    Every nn.RNN, nn.GRU and nn.LSTM is converted, sparse training modules and plain ones alike, by reading the zeros in
    its weights. The original is untouched and shares every tensor that was not converted; what else its modules hold is
    copied. A layer of a subclass that adds methods or class attributes of its own would lose them; it is left as it is,
    with a warning that names it, unless a subclass of PersistentRNN, PersistentGRU or PersistentLSTM that has them too
    names it as its `dense_class`. nn.RNNCell, nn.GRUCell and nn.LSTMCell have no converted form; a warning names them.
    A weight that a parametrization computes is converted as it is now; one that a hook computes, by torch's older
    weight norm or its pruning, is refused with the call that makes it a parameter again.

    Args:
        model: any module; a recurrent layer by itself is converted too. Call .eval() first, as for any inference.
        weight_dtype, block_size, backend, activation_dtype, num_threads: as for `PersistentGRU.from_dense`.
    Returns:
        A new model of the same class; for a recurrent layer by itself the persistent module.
    Raises:
        TypeError, ValueError: an argument is wrong, `model` has no layer to convert, or one of its modules holds
            something that cannot be copied, such as a lock; then convert the layer itself, as in
            `model.rnn = to_sparse(model.rnn)`.
        BackendUnavailableError: `backend` is named and cannot run one of the layers.

    >>> from triton_sparse_rnn import SparseGRU
    >>> model = nn.Sequential(nn.Linear(4, 4), SparseGRU(4, 8)).eval()
    >>> for weight in (model[1].weight_ih_l0, model[1].weight_hh_l0):
    ...     _ = weight.detach()[:, 1:].zero_()
    >>> to_sparse(model)[1](torch.zeros(5, 2, 4))[0].shape
    torch.Size([5, 2, 8])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    layers = named_recurrent_layers(model)
    converted: dict[str, nn.Module] = {}
    left = []
    for name, layer in layers.items():
        new_class = persistent_class(layer)
        dense_class = new_class.dense_class
        training_class = TRAINING_CLASSES.get(dense_class, dense_class)
        base = training_class if isinstance(layer, training_class) else dense_class
        if lost := lost_members(layer, base):
            left.append(f"'{name}' is a {type(layer).__name__}, which would lose {', '.join(lost)}")
            continue
        with about_layer(name):
            converted[name] = new_class.from_dense(
                layer,
                weight_dtype=weight_dtype,
                block_size=block_size,
                backend=backend,
                activation_dtype=activation_dtype,
                num_threads=num_threads,
            )
    cells = describe_cells(model)
    if not converted:
        found = "; ".join([*left, *cells]) or "none"
        raise ValueError(f"model must hold an nn.RNN, nn.GRU or nn.LSTM, got a {type(model).__name__} with {found}")
    advice = "derive a class from PersistentGRU and the like that has them too, with its class as dense_class"
    kept = [f"{'; '.join(left)}; {advice}"] if left else []
    kept += [f"{'; '.join(cells)}; {CELL_ADVICE}"] if cells else []
    if kept:
        warn(f"to_sparse left some layers dense: {'. '.join(kept)}")
    return _converted_copy(model, converted)


def to_dense(model: nn.Module) -> Any:
    """Return a model with plain nn.RNN, nn.GRU and nn.LSTM in place of the persistent and the training modules.

    This is the way to what knows torch.nn only, or goes by exact type: dynamic quantisation, ONNX, torch.jit.script,
    operation counters. Weights of persistent modules are exactly the ones that were converted unless weight_dtype was
    narrower. A training module keeps all that it holds, its hooks and flags too, but its `gate_gradient`, without which
    it gives the same results and other gradients. The original is untouched and shares every tensor that was not
    converted. A layer of a subclass of SparseGRU and the like that adds members of its own is left as it is, with a
    warning that names it.

    Raises:
        TypeError: `model` is not a module, or holds something that cannot be copied, as for `to_sparse`.
        ValueError: it has no persistent and no training module.

    >>> from triton_sparse_rnn import SparseGRU
    >>> to_dense(nn.Sequential(SparseGRU(4, 8)))
    Sequential(
      (0): GRU(4, 8)
    )
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    converted: dict[str, nn.Module] = {
        name: module.to_dense() for name, module in model.named_modules() if isinstance(module, PersistentLayer)
    }
    trained: dict[str, type[RNNBase]] = {}
    left = []
    for name, layer in named_recurrent_layers(model).items():
        dense_class, training_class = classes_of(layer)
        if not isinstance(layer, training_class):
            continue
        if lost := added_members(layer, training_class):
            left.append(f"'{name}' is a {type(layer).__name__}, which would lose {', '.join(lost)}")
        else:
            trained[name] = dense_class
    if not converted and not trained:
        found = "; ".join(left) or "none"
        raise ValueError(
            f"model must hold a module that to_sparse() or sparsify() made, got a {type(model).__name__} with {found}"
        )
    if left:
        advice = "undo a parametrization first, or put an instance of torch.nn's class there by hand"
        warn(f"to_dense left some layers as they are: {'; '.join(left)}; {advice}")
    dense = _converted_copy(model, converted)
    for name, dense_class in trained.items():  # as `sparsify` does: the copy of the layer only changes its class
        layer = dense.get_submodule(name)
        vars(layer).pop("_gate_gradient", None)
        layer.__class__ = dense_class
    return dense


def _converted_copy(model: nn.Module, converted: Mapping[str, nn.Module]) -> nn.Module:
    """Return a copy of `model` with converted layers; hooks that are methods of its modules act on the copy."""
    copied = copy_with_replacements(model, converted)
    names = {id(module): name for name, module in model.named_modules()}
    for layer_name, new in converted.items():
        take_hooks(new, model.get_submodule(layer_name))
        for hooks in (new._forward_hooks, new._forward_pre_hooks):
            for key, hook in hooks.items():
                if isinstance(hook, types.MethodType) and (name := names.get(id(hook.__self__))) is not None:
                    hooks[key] = types.MethodType(hook.__func__, copied.get_submodule(name))
    return copied
