"""What the three training modules add to torch.nn's: the way in, the way out, and what torch's tools ask of them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

from torch import nn
from torch.nn import RNNBase

from triton_sparse_rnn.nn.conversion_options import ConversionOptions, shows_options
from triton_sparse_rnn.nn.fx_tracing import record_call, tracer_of
from triton_sparse_rnn.nn.instance_state import HOOKS, take_over, what_is_lost
from triton_sparse_rnn.nn.persistent import PersistentLayer
from triton_sparse_rnn.nn.persistent_module import persistent_class
from triton_sparse_rnn.nn.replace import added_members
from triton_sparse_rnn.notices import warn
from triton_sparse_rnn.sparse.layer_config import LayerConfig

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

PersistentT = TypeVar("PersistentT", bound=PersistentLayer)


class TrainingLayer(nn.Module, Generic[PersistentT]):
    """The part of SparseRNN, SparseGRU and SparseLSTM that is not torch.nn's; PersistentT is what they become."""

    dense_class: ClassVar[type[RNNBase]]

    @classmethod
    def from_dense(cls, dense: RNNBase) -> Self:
        """Return a layer on the very same parameters as `dense`, a layer of the dense class: nn.GRU for a SparseGRU.

        Parameter objects are shared, not copied: an optimizer that holds them goes on training them, and a step taken
        through one layer is seen by the other. Options and train/eval are taken over, and so are, shared too, hooks,
        parameters, buffers, modules and attributes that were added to `dense`, but not a `gate_gradient`; `sparsify`
        keeps that too.

        Raises:
            TypeError: `dense` is not of the dense class, or its class (a parametrized one for instance) or the layer
                itself (a `forward` set on it) adds members that would be lost.
            ValueError: a weight of `dense` is no parameter (nn.utils.weight_norm).
        """
        _check_dense(cls, dense)
        layer_class: Any = cls  # a mixin does not know its other base, which is the dense class
        layer = LayerConfig.of(dense).build(layer_class, device="meta")
        expected = [name for name, _ in layer.named_parameters()]
        if missing := [name for name in expected if dense._parameters.get(name) is None]:
            raise ValueError(
                f"{cls.__name__}.from_dense: dense must hold the parameters {', '.join(expected)}, got none for "
                f"{', '.join(missing)}; undo weight norm first"
            )
        for name in expected:
            setattr(layer, name, dense._parameters[name])
        take_over(layer, dense, lambda value: value)
        for kind in HOOKS:  # each layer has its own dicts of the same hooks, and those that take a module get this one
            hooks = getattr(layer, kind).copy()
            for key, hook in hooks.items():
                if getattr(hook, "with_module", False):
                    hooks[key] = copy.deepcopy(hook, {id(dense): layer, id(hook.hook): hook.hook})
            vars(layer)[kind] = hooks
        return layer.train(dense.training)

    @shows_options
    def to_sparse(self, **options: Unpack[ConversionOptions]) -> PersistentT:
        """Return an inference module that skips the zeros; this layer stays. See `PersistentGRU.from_dense`."""
        layer = cast("RNNBase", self)
        cls: Any = persistent_class(layer)
        return cls.from_dense(layer, **options)

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        """Be a leaf to torch.fx, as torch.nn's layers are: before hooks, which then run when the graph does."""
        tracer = tracer_of(args, kwargs)
        return super()._call_impl(*args, **kwargs) if tracer is None else record_call(tracer, self, args, kwargs)

    def __prepare_scriptable__(self) -> RNNBase:
        """Give torch.jit.script, which cannot compile this class, torch.nn's own on the very same parameters."""
        training_class = next(cls for cls in type(self).__mro__ if "dense_class" in vars(cls))
        ours, theirs = type(self).__name__, f"nn.{self.dense_class.__name__}"
        if lost := added_members(self, training_class):
            raise RuntimeError(
                f"torch.jit.script can take an {theirs} instead of this {ours}, but that would lose {', '.join(lost)}: "
                "undo a parametrization first, or script a model with an instance of the class without them"
            )
        if getattr(self, "gate_gradient", None) is not None:
            raise RuntimeError(
                f"torch.jit.script can take an {theirs} instead of this {ours}, but would put it into the model that "
                "it is given, too, which would lose its gate_gradient: script to_dense(model), a copy, or set "
                "layer.gate_gradient = None first"
            )
        warn(
            f"torch.jit.script takes an {theirs} on the same parameters instead of a {ours}, and puts it into the "
            "model that it is given, too: sparsify(model) changes that back, and to_dense(model) is a copy to script"
        )
        dense = self.dense_class.__new__(self.dense_class)
        vars(dense).update(vars(self))
        return dense


def _check_dense(cls: type[TrainingLayer[Any]], dense: object) -> None:
    """Raise TypeError unless `dense` is a layer of the dense class that has nothing to lose in `cls`."""
    place, dense_class = f"{cls.__name__}.from_dense: dense must be", f"nn.{cls.dense_class.__name__}"
    if not isinstance(dense, cls.dense_class):
        got = f"the class {dense.__name__}" if isinstance(dense, type) else f"a {type(dense).__name__}"
        raise TypeError(f"{place} an {dense_class}, got {got}")
    if lost := added_members(dense, cls):
        raise TypeError(
            f"{place} an {dense_class} without members of its own, got a {type(dense).__name__}, which would lose "
            f"{', '.join(lost)}; derive its class from {cls.__name__} or undo its parametrization first"
        )
    kept, way_out = what_is_lost(dense, cls)
    if kept:
        raise TypeError(f"{place} without members of its own, got {kept}; {way_out}")
