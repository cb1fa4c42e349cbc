"""Whole models: the training modules in, the persistent modules out, and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn import RNNBase

from triton_sparse_rnn.names import clean_name
from triton_sparse_rnn.nn.cells import CELL_ADVICE, describe_cells
from triton_sparse_rnn.nn.conversion_options import ConversionOptions, complete, shows_options
from triton_sparse_rnn.nn.convertible import why_not_converted
from triton_sparse_rnn.nn.independent_copy import copy_with_replacements
from triton_sparse_rnn.nn.linear_choice import choose_linear_layers
from triton_sparse_rnn.nn.linear_layers import FilterFn
from triton_sparse_rnn.nn.persistent_module import PersistentModule, persistent_class
from triton_sparse_rnn.nn.replace import added_members, named_recurrent_layers
from triton_sparse_rnn.nn.sparsify import sparsify
from triton_sparse_rnn.nn.training import classes_of
from triton_sparse_rnn.notices import about_layer, warn

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["sparsify", "to_dense", "to_sparse", "warm_up"]


@shows_options
def to_sparse(
    model: nn.Module,
    filter_fn: FilterFn | None = None,
    *,
    include: Iterable[str] | None = None,
    **options: Unpack[ConversionOptions],
) -> Any:  # a module; of a class whose annotations do not know that its layers have other classes now
    """Return a model whose recurrent layers run from sparse weights, for inference, and linear layers that are named.

    Every nn.RNN, nn.GRU and nn.LSTM is converted, sparse training modules and plain ones alike, by reading the zeros in
    its weights. An nn.Linear, and an nn.Conv1d of kernel size 1, is converted where `include` or `filter_fn` says so
    and it is faster then: a model often reads the weight of a linear layer itself, ties it, or trains it on. Hooks, and
    parameters, buffers, modules and attributes that were added to a layer, are taken over.

    The original is untouched, and nothing is shared with it: the result does not change when the original is trained
    further. What is not converted is copied as copy.deepcopy does, without gradients, and tensors that are the result
    of a computation are detached. Who cannot afford the memory of that copy converts the layer itself and puts it in
    its place, `model.rnn = to_sparse(model.rnn)`: then all the rest stays the model's own.

    A layer would lose the methods and class attributes that its class adds, or a `forward` that was set on the layer
    itself. It is left as it is, with a warning that names it, unless a subclass of PersistentRNN, PersistentGRU,
    PersistentLSTM or PersistentLinear that has the members too names its class as its `dense_class`.

    nn.RNNCell, nn.GRUCell and nn.LSTMCell have no converted form; a warning names them. A weight that a parametrization
    computes is converted as it is now; one that a hook computes, by torch's older weight norm or its pruning, is
    refused with the call that makes it a parameter again.

    Args:
        model: any module; a recurrent or linear layer by itself is converted too. Call .eval() first, as for any
            inference.
        filter_fn: called as filter_fn(layer, name) for every recurrent and linear layer, False leaves it as it is. A
            shared layer is asked for once, by its first name; the name of `model` itself is "". None takes every
            recurrent layer, and linear ones by `include`.
        include: globs of weights of linear layers, those of `Pruner(include=...)`, such as ("decoder.weight",). None
            takes what `filter_fn` takes or, without one, none; then a warning names those that were pruned. () is none,
            without a warning. A named layer that would not be faster, by an estimate for one row and for many
            (nn/storage_choice.py), is left, with a warning, unless `storage` or another weight_dtype is named.
        options: weight_dtype, storage, backend, activation_dtype and num_threads, as for `PersistentGRU.from_dense`.
    Returns:
        A new model of the same class; for a recurrent or linear layer by itself the persistent module.
    Raises:
        TypeError, ValueError: an argument is wrong, `model` has no layer to convert, or one of its modules holds
            something that cannot be copied: a lock, or a function that refers to the model by its closure, as
            `model.forward = torch.no_grad()(model.forward)` does. Take that away, or convert the layer itself.
        BackendUnavailableError: `backend` is named and cannot run one of the layers.

    >>> import torch
    >>> from triton_sparse_rnn import SparseGRU
    >>> model = nn.Sequential(nn.Linear(4, 4), SparseGRU(4, 8)).eval()
    >>> for weight in (model[1].weight_ih_l0, model[1].weight_hh_l0):
    ...     _ = weight.detach()[:, 1:].zero_()
    >>> to_sparse(model)[1](torch.zeros(5, 2, 4))[0].shape
    torch.Size([5, 2, 8])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be callable as filter_fn(layer, name), got {filter_fn!r}")
    completed = complete("to_sparse", options)
    layers: dict[str, nn.Module] = {**named_recurrent_layers(model)}
    layers = {name: layer for name, layer in layers.items() if filter_fn is None or filter_fn(layer, name)}
    choice = choose_linear_layers(model, include, filter_fn, completed)
    converted: dict[str, nn.Module] = {}
    left, ways_out = [], []
    for name, layer in (layers | choice.chosen).items():
        reason, way_out = why_not_converted(layer)
        if reason:
            left.append(f"'{clean_name(name)}' is {reason}")
            ways_out.append(way_out)
            continue
        with about_layer(clean_name(name)):
            converted[name] = persistent_class(layer)._from_weights(layer, completed)
    cells = describe_cells(model)
    kept = [f"{'; '.join(left)}; {'; '.join(dict.fromkeys(ways_out))}"] if left else []
    kept += choice.left
    kept += [f"{'; '.join(cells)}; {CELL_ADVICE}"] if cells else []
    found = ". ".join(kept)
    if not converted:
        refused = "layers that filter_fn refused" if filter_fn is not None and not found else ""
        raise ValueError(
            "model must hold an nn.RNN, nn.GRU or nn.LSTM, or an nn.Linear that is named and pruned, got a "
            f"{type(model).__name__} with {found or refused or 'none'}"
        )
    if found:
        warn(f"to_sparse left some layers dense: {found}")
    return copy_with_replacements(model, converted)


def to_dense(model: nn.Module) -> Any:
    """Return a model with plain layers of torch.nn in place of the persistent and the training modules.

    This is the way to what knows torch.nn only, or goes by exact type: dynamic quantisation, ONNX, torch.jit.script,
    operation counters. Weights of persistent modules are exactly the ones that were converted unless weight_dtype was
    narrower. A training module keeps all that it holds, its hooks and flags too, but its `gate_gradient`, without which
    it gives the same results and other gradients. A layer of a subclass of SparseGRU and the like that adds members of
    its own is left as it is, with a warning that names it.

    The original is untouched and nothing is shared with it, and what was added to a layer is taken over, both as in
    `to_sparse`.

    Raises:
        TypeError: `model` is not a module, or holds something that cannot be copied, as for `to_sparse`.
        ValueError: it has no persistent and no training module, or a persistent one whose own `forward`, set on the
            layer itself, would be lost.

    >>> from triton_sparse_rnn import SparseGRU
    >>> to_dense(nn.Sequential(SparseGRU(4, 8)))
    Sequential(
      (0): GRU(4, 8)
    )
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    converted: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, PersistentModule):
            with about_layer(clean_name(name)):
                converted[name] = module._to_weights()
    trained: dict[str, type[RNNBase]] = {}
    left = []
    for name, layer in named_recurrent_layers(model).items():
        dense_class, training_class = classes_of(layer)
        if not isinstance(layer, training_class):
            continue
        if lost := added_members(layer, training_class):
            left.append(f"'{clean_name(name)}' is a {type(layer).__name__}, which would lose {', '.join(lost)}")
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
    changed = [model.get_submodule(name) for name in trained]
    dense = copy_with_replacements(model, converted, changed)
    for name, dense_class in trained.items():  # as `sparsify` does: the copy of the layer only changes its class
        layer = dense.get_submodule(name)
        vars(layer).pop("gate_gradient_controller", None)
        layer.__class__ = dense_class
    return dense


def warm_up(model: nn.Module) -> None:
    """Do now what the first call of each persistent module would do besides: prepare weights, and compile kernels.

    See `PersistentGRU.warm_up`, which this calls for every one of them.

    Raises:
        TypeError: `model` is not a module.
        ValueError: it has no persistent module.

    >>> from triton_sparse_rnn import SparseGRU
    >>> layer = SparseGRU(4, 8)
    >>> _ = layer.weight_ih_l0.data.fill_(0), layer.weight_hh_l0.data.fill_(0)  # pruned
    >>> warm_up(to_sparse(layer))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    persistent = [module for module in model.modules() if isinstance(module, PersistentModule)]
    if not persistent:
        raise ValueError(f"model must hold a module that to_sparse() made, got a {type(model).__name__} with none")
    for module in persistent:
        module.warm_up()
