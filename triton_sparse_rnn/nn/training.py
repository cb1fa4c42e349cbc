"""The training modules: PyTorch's own recurrent layers under another name.

While weights are pruned they are ordinary zeros in ordinary parameters, so a training module has nothing to compute
differently. It is a true subclass that inherits every behaviour, and adds the way in (`from_dense`) and the way out
(`to_sparse`). An LSTM or GRU with a `gate_gradient` goes its own way in training: see gate_gradients/layer.py.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.nn import GRU, LSTM, RNN, RNNBase  # bound here, so that a patched torch.nn.GRU may be a SparseGRU

from triton_sparse_rnn.gate_gradients.layer import GateGradientLayer
from triton_sparse_rnn.nn.instance_state import HOOKS, take_over, what_is_lost
from triton_sparse_rnn.nn.persistent import PersistentGRU, PersistentLSTM, PersistentRNN
from triton_sparse_rnn.nn.replace import added_members
from triton_sparse_rnn.nn.training_tools import TrainingTools

if TYPE_CHECKING:
    from typing_extensions import Self

from triton_sparse_rnn.sparse.patterns import PatternLike

LayerT = TypeVar("LayerT", bound=RNNBase)


class SparseRNN(TrainingTools, RNN):
    """nn.RNN, to be trained while a `Pruner` masks its weights; arguments, call and state_dict are those of nn.RNN.

    >>> layer = SparseRNN(4, 8, nonlinearity="relu")
    >>> y, h = layer(torch.zeros(5, 2, 4))  # x [T, B, I] -> y [T, B, H], h [L, B, H]
    >>> layer
    SparseRNN(4, 8)
    """

    @classmethod
    def from_dense(cls, dense: RNN) -> Self:
        """Return a layer on the very same parameters as `dense`; see `SparseGRU.from_dense`."""
        _check_dense(cls, RNN, dense)
        return _share_parameters(cls(*_sizes(dense), nonlinearity=dense.nonlinearity, **_options(dense)), dense)

    def to_sparse(
        self,
        *,
        weight_dtype: torch.dtype | None = None,
        storage: PatternLike | None = None,
        backend: str | None = None,
        activation_dtype: torch.dtype | None = None,
        num_threads: int = 1,
    ) -> PersistentRNN:
        """Return an inference module that skips the zeros; this layer stays. See `PersistentRNN.from_dense`."""
        return PersistentRNN.from_dense(
            self,
            weight_dtype=weight_dtype,
            storage=storage,
            backend=backend,
            activation_dtype=activation_dtype,
            num_threads=num_threads,
        )


class _GatedLayer(GateGradientLayer, TrainingTools):
    """What SparseGRU and SparseLSTM share."""


class SparseGRU(_GatedLayer, GRU):
    """nn.GRU, to be trained while a `Pruner` masks its weights; arguments, call and state_dict are those of nn.GRU.

    One argument is added, by name only: `gate_gradient`, a `GateGradientSparsity` by which small gate gradients become
    zero in training. It can be set later, too.

    >>> layer = SparseGRU(4, 8, num_layers=2)  # was nn.GRU(4, 8, num_layers=2)
    >>> y, h = layer(torch.zeros(5, 2, 4))  # x [T, B, I] -> y [T, B, H], h [L, B, H]
    >>> isinstance(layer, torch.nn.GRU), layer
    (True, SparseGRU(4, 8, num_layers=2))
    """

    @classmethod
    def from_dense(cls, dense: GRU) -> Self:
        """Return a layer on the very same parameters as `dense`.

        Parameter objects are shared, not copied: an optimizer that holds them goes on training them, and a step taken
        through one layer is seen by the other. Options and train/eval are taken over, and so are, shared too, hooks,
        parameters, buffers, modules and attributes that were added to `dense`, but not a `gate_gradient`; `sparsify`
        keeps that too.

        Raises:
            TypeError: `dense` is not an nn.GRU, or its class (a parametrized one for instance) or the layer itself
                (a `forward` set on it) adds members that would be lost.
            ValueError: a weight of `dense` is no parameter (nn.utils.weight_norm).
        """
        _check_dense(cls, GRU, dense)
        return _share_parameters(cls(*_sizes(dense), **_options(dense)), dense)

    def to_sparse(
        self,
        *,
        weight_dtype: torch.dtype | None = None,
        storage: PatternLike | None = None,
        backend: str | None = None,
        activation_dtype: torch.dtype | None = None,
        num_threads: int = 1,
    ) -> PersistentGRU:
        """Return an inference module that skips the zeros; this layer stays. See `PersistentGRU.from_dense`."""
        return PersistentGRU.from_dense(
            self,
            weight_dtype=weight_dtype,
            storage=storage,
            backend=backend,
            activation_dtype=activation_dtype,
            num_threads=num_threads,
        )


class SparseLSTM(_GatedLayer, LSTM):
    """nn.LSTM, to be trained while a `Pruner` masks its weights; arguments, call and state_dict are those of nn.LSTM.

    One argument is added, by name only: `gate_gradient`, a `GateGradientSparsity` by which small gate gradients become
    zero in training. It can be set later, too.

    >>> layer = SparseLSTM(4, 8, batch_first=True)
    >>> y, (h, c) = layer(torch.zeros(2, 5, 4))  # x [B, T, I] -> y [B, T, H], h and c [L, B, H]
    >>> layer
    SparseLSTM(4, 8, batch_first=True)
    """

    @classmethod
    def from_dense(cls, dense: LSTM) -> Self:
        """Return a layer on the very same parameters as `dense`; see `SparseGRU.from_dense`."""
        _check_dense(cls, LSTM, dense)
        return _share_parameters(cls(*_sizes(dense), proj_size=dense.proj_size, **_options(dense)), dense)

    def to_sparse(
        self,
        *,
        weight_dtype: torch.dtype | None = None,
        storage: PatternLike | None = None,
        backend: str | None = None,
        activation_dtype: torch.dtype | None = None,
        num_threads: int = 1,
    ) -> PersistentLSTM:
        """Return an inference module that skips the zeros; this layer stays. See `PersistentLSTM.from_dense`."""
        return PersistentLSTM.from_dense(
            self,
            weight_dtype=weight_dtype,
            storage=storage,
            backend=backend,
            activation_dtype=activation_dtype,
            num_threads=num_threads,
        )


TRAINING_CLASSES: dict[type[RNNBase], type[RNNBase]] = {RNN: SparseRNN, GRU: SparseGRU, LSTM: SparseLSTM}


def classes_of(layer: RNNBase) -> tuple[type[RNNBase], type[RNNBase]]:
    """Return the dense class that `layer`, an nn.RNN, nn.GRU or nn.LSTM, is an instance of, and the training class."""
    return next((dense, training) for dense, training in TRAINING_CLASSES.items() if isinstance(layer, dense))


def _check_dense(cls: type[RNNBase], dense_class: type[RNNBase], dense: object) -> None:
    if not isinstance(dense, dense_class):
        got = f"the class {dense.__name__}" if isinstance(dense, type) else f"a {type(dense).__name__}"
        raise TypeError(f"{cls.__name__}.from_dense: dense must be an nn.{dense_class.__name__}, got {got}")
    if lost := added_members(dense, cls):
        raise TypeError(
            f"{cls.__name__}.from_dense: dense must be an nn.{dense_class.__name__} without members of its own, got a "
            f"{type(dense).__name__}, which would lose {', '.join(lost)}; derive its class from {cls.__name__} or undo "
            "its parametrization first"
        )
    kept, way_out = what_is_lost(dense, cls)
    if kept:
        raise TypeError(f"{cls.__name__}.from_dense: dense must be without members of its own, got {kept}; {way_out}")


def _sizes(dense: RNNBase) -> tuple[int, int]:
    return dense.input_size, dense.hidden_size


def _options(dense: RNNBase) -> dict[str, Any]:
    # Without dropout: the constructor would warn of dropout in a single layer a second time.
    names = ("num_layers", "bias", "batch_first", "bidirectional")
    return {name: getattr(dense, name) for name in names} | {"device": "meta"}


def _share_parameters(layer: LayerT, dense: RNNBase) -> LayerT:
    """Put the parameters of `dense` in the place of those of `layer`, newly made, and take over what is left."""
    expected = [name for name, _ in layer.named_parameters()]
    if missing := [name for name in expected if dense._parameters.get(name) is None]:
        raise ValueError(
            f"{type(layer).__name__}.from_dense: dense must hold the parameters {', '.join(expected)}, got none for "
            f"{', '.join(missing)}; undo weight norm first"
        )
    for name in expected:
        setattr(layer, name, dense._parameters[name])
    take_over(layer, dense, lambda value: value)
    for kind in HOOKS:  # the hooks are the same, but each layer has its own, and those that take a module get this one
        hooks = getattr(layer, kind).copy()
        for key, hook in hooks.items():
            if getattr(hook, "with_module", False):
                hooks[key] = copy.deepcopy(hook, {id(dense): layer, id(hook.hook): hook.hook})
        vars(layer)[kind] = hooks
    layer.dropout = dense.dropout
    return layer.train(dense.training)
