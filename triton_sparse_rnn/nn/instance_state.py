"""What a layer holds that neither its class nor its constructor gave it, and how another layer takes it over.

It is added by setattr, register_buffer and the like, and by hooks. What overrides a method on the instance cannot be
taken over: it was written for the forward of the old class.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn
from torch.nn import (  # bound here, so that a patched torch.nn.GRU may be a SparseGRU
    GRU,
    LSTM,
    RNN,
    Conv1d,
    Linear,
    RNNBase,
)
from torch.nn.utils.parametrize import is_parametrized

from triton_sparse_rnn.nn.storage import buffer_names
from triton_sparse_rnn.notices import in_layer
from triton_sparse_rnn.sparse.linear_config import Config, LinearConfig, config_of

HOOKS = tuple(name for name in vars(nn.Module()) if "_hooks" in name)
_NOT_TAKEN = {
    "_compiled_call_impl",  # of module.compile(); torch's own copies leave it out too
    "gate_gradient_controller",  # for training only
    "flatten_parameters",  # some libraries put nothing in its place; it changes no result
}
# What PersistentModule.__init__ sets; its tensors are those of `own_tensors`.
_PERSISTENT_ATTRIBUTES = {"_config", "_plan", "backend", "activation_dtype", "num_threads"}


class Added(NamedTuple):
    """What was added to a layer, by name."""

    attributes: dict[str, Any]
    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, Any]
    modules: dict[str, nn.Module | None]
    hooks: dict[str, dict[int, Any]]

    def holdings(self) -> dict[str, Any]:
        """All of it under the names by which one finds it on the layer."""
        hooks = {kind: held for kind, held in self.hooks.items() if held}
        return self.attributes | self.parameters | self.buffers | self.modules | hooks


def own_tensors(layer: nn.Module) -> set[str]:
    """Return the names of the weights of a dense layer, or of all that a persistent one may hold them in."""
    return _own_tensors(type(layer), config_of(layer))


def added_state(layer: nn.Module) -> Added:
    """Return what was added to a recurrent or linear layer, dense or persistent; attributes that override a method too.

    >>> layer = nn.GRU(2, 3)
    >>> layer.label = "encoder"
    >>> layer.register_buffer("scale", None)
    >>> added = added_state(layer)
    >>> added.attributes, added.buffers
    ({'label': 'encoder'}, {'scale': None})
    """
    tensors, attributes = own_tensors(layer), _own_attributes(type(layer))
    return Added(
        {name: value for name, value in vars(layer).items() if name not in attributes | tensors},
        {name: value for name, value in layer._parameters.items() if name not in tensors},
        {name: value for name, value in layer._buffers.items() if name not in tensors},
        {
            name: value
            for name, value in layer._modules.items()
            if not (name == "parametrizations" and is_parametrized(layer))
        },
        {kind: getattr(layer, kind) for kind in HOOKS},
    )


def overriding_attributes(layer: nn.Module) -> list[str]:
    """Return the attributes of a layer that stand before a method or attribute of its class, such as a `forward`.

    A class that is neither torch's nor ours does not count: the one that it is converted to has its members too. Nor
    does a method of the class that was only bound and set again, as tools do when they take their own away.

    >>> layer = nn.GRU(2, 3)
    >>> layer.forward = lambda input, hx=None: nn.GRU.forward(layer, 2 * input, hx)
    >>> overriding_attributes(layer)
    ['forward']
    """
    known = _known_class(type(layer))
    return sorted(
        name
        for name, value in added_state(layer).attributes.items()
        if hasattr(known, name) and not _is_own_method(layer, name, value)
    )


def colliding_names(layer: nn.Module, new_class: type[nn.Module]) -> list[str]:
    """Return what was added to a layer under a name that the class it is converted to uses itself."""
    known: Any = _known_class(new_class)
    taken = _own_attributes(known) | _own_tensors(known, config_of(layer))
    attributes, *others, _ = added_state(layer)
    names = {name for name, value in attributes.items() if not _is_own_method(layer, name, value)}.union(*others)
    return sorted(name for name in names if name in taken or hasattr(known, name))


def what_is_lost(layer: nn.Module, new_class: type[nn.Module]) -> tuple[str, str]:
    """Return what of its own a layer would lose if it were converted, and the way out; empty texts if nothing.

    >>> what_is_lost(nn.GRU(2, 3), nn.GRU)
    ('', '')
    """
    kind = type(layer).__name__
    if lost := overriding_attributes(layer):
        accelerate = "accelerate.hooks.remove_hook_from_module(model, recurse=True) takes accelerate's away"
        names = ", ".join(lost)
        way_out = accelerate if hasattr(layer, "_hf_hook") else f"take {names} away first, and set it again afterwards"
        return f"a {kind}, which has its own {names} set on the layer itself and would lose it", way_out
    if taken := colliding_names(layer, new_class):
        names = ", ".join(taken)
        return f"a {kind}, to which {names} was added, a name that {new_class.__name__} uses itself", "rename it"
    if is_parametrized(layer) and (lost := [*layer.parametrizations.keys() - own_tensors(layer)]):  # type: ignore[union-attr, reportCallIssue]
        names = ", ".join(sorted(lost))
        way_out = "torch.nn.utils.parametrize.remove_parametrizations makes it a parameter"
        return f"a {kind}, which would lose {names}, that a parametrization computes", way_out
    return "", ""


def check_nothing_is_lost(layer: nn.Module, new_class: type[nn.Module]) -> None:
    """Raise ValueError if something of its own that a layer holds would be lost in `new_class`."""
    lost, way_out = what_is_lost(layer, new_class)
    if lost:
        named = f"'{path}'" if (path := in_layer("")) else "the layer"
        raise ValueError(f"{named} cannot be converted: it is {lost}; {way_out}")


def take_over(new: nn.Module, old: nn.Module, copied: Callable[[Any], Any]) -> None:
    """Give `new` what was added to `old`, hooks too.

    Args:
        new: of a class that needs none of the names; see `colliding_names`.
        old: keeps all of it.
        copied: what becomes of a value; of a dict of hooks it returns the one that `new` then holds.
    """
    added = added_state(old)
    for name, value in added.attributes.items():
        if not _is_own_method(old, name, value):
            vars(new)[name] = copied(value)
    for name, parameter in added.parameters.items():
        new._parameters[name] = copied(parameter)
    for name, buffer in added.buffers.items():
        new._buffers[name] = copied(buffer)
        if name in old._non_persistent_buffers_set:
            new._non_persistent_buffers_set.add(name)
    for name, module in added.modules.items():
        new._modules[name] = copied(module)
    for kind, hooks in added.hooks.items():
        taken = copied(hooks)
        for key, hook in getattr(new, kind).items():
            taken.setdefault(key, hook)
        vars(new)[kind] = taken
    if old._is_full_backward_hook is not None:
        new._is_full_backward_hook = old._is_full_backward_hook


def become(layer: nn.Module, new: nn.Module) -> Callable[[], None]:
    """Make `layer` what `new` is, with what was added to it: whatever refers to it goes on doing so.

    Args:
        layer: a recurrent or linear layer.
        new: not to be used afterwards.
    Returns:
        What undoes it.
    Raises:
        TypeError: Python cannot change the class, as of one with __slots__ or with further bases; nothing has changed.
    """
    old_class, old_state = type(layer), dict(vars(layer))

    def undo() -> None:
        layer.__class__ = old_class
        vars(layer).clear()
        vars(layer).update(old_state)

    take_over(new, layer, lambda value: value)
    layer.__class__ = type(new)
    vars(layer).clear()
    vars(layer).update(vars(new))
    return undo


def stand_in(model: nn.Module, layer: nn.Module, new: nn.Module) -> Callable[[], None]:
    """Put `new` in every place that `layer` has in the modules of a model, after a `become` that Python refused.

    Returns:
        What undoes it.
    """
    places = [(module, name) for module in model.modules() for name, held in module._modules.items() if held is layer]

    def put(module: nn.Module) -> None:
        for parent, name in places:
            parent._modules[name] = module

    put(new)
    return lambda: put(layer)


def _is_own_method(layer: nn.Module, name: str, value: object) -> bool:
    """Whether an attribute is a method of the layer's own class, bound to it."""
    return (
        isinstance(value, types.MethodType)
        and value.__self__ is layer
        and any(vars(cls).get(name) is value.__func__ for cls in type(layer).__mro__)
    )


def _own_tensors(cls: type, config: Config) -> set[str]:
    if issubclass(cls, (Linear, Conv1d)):
        return {"weight", "bias"}  # the bias may be None
    if issubclass(cls, RNNBase):
        return {*config.weight_names()}
    return buffer_names(config) | {"_marker"} | ({"bias"} if isinstance(config, LinearConfig) else set())


def _own_attributes(cls: type) -> set[str]:
    """What a layer of the class, and of no class of a user's, holds."""
    dense = next((base for base in (RNN, GRU, LSTM, Linear, Conv1d) if issubclass(cls, base)), None)
    return {*vars(nn.Module()), *_NOT_TAKEN} | (_PERSISTENT_ATTRIBUTES if dense is None else _dense_attributes(dense))


@functools.cache
def _dense_attributes(dense: Any) -> set[str]:
    more: dict[str, Any] = {"kernel_size": 1} if dense is Conv1d else {}
    return set(vars(dense(1, 1, device="meta", **more)))


def _known_class(cls: type) -> type:
    """The nearest of a class and its bases that is torch's or ours."""
    return next(base for base in cls.__mro__ if base.__module__.partition(".")[0] in ("torch", "triton_sparse_rnn"))
