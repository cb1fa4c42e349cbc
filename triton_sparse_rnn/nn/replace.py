"""Find the recurrent layers of a model, and put other modules in their places."""

from __future__ import annotations

import collections
import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import GRU, LSTM, RNN, RNNBase

_NOT_BEHAVIOUR = {
    "__init__",  # is over once a layer exists
    # what a class statement writes by itself:
    "__annotate__",
    "__annotate_func__",
    "__annotations__",
    "__annotations_cache__",
    "__dict__",
    "__doc__",
    "__firstlineno__",
    "__module__",
    "__static_attributes__",
    "__weakref__",
}


def named_recurrent_layers(model: nn.Module) -> dict[str, RNNBase]:
    """Return every nn.RNN, nn.GRU and nn.LSTM of `model`, instances of subclasses too, by name.

    A layer that is shared appears once, under the first of its names; `model` itself has the name "". As with
    `model.named_modules()`, a module kept in a plain list is not found.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, (RNN, GRU, LSTM))}


def added_members(layer: nn.Module, base: type[nn.Module]) -> list[str]:
    """Return the names of methods and class attributes that the class of `layer` overrides in `base` or adds to it.

    They are what is lost when a module of another class takes the place of `layer`. What the instance holds is not
    looked at.

    >>> import torch
    >>> class Stateful(nn.GRU):
    ...     def __init__(self, size):
    ...         super().__init__(size, size)
    ...     def initial_state(self):
    ...         return torch.zeros(self.num_layers, 1, self.hidden_size)
    >>> added_members(Stateful(4), nn.GRU)
    ['initial_state']
    """
    added = [cls for cls in type(layer).__mro__ if cls not in base.__mro__]
    return sorted({name for cls in added for name in vars(cls)} - _NOT_BEHAVIOUR)


def replace_modules(model: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """Replace modules of `model` in place and return the model.

    A module that is shared is replaced under all of its names. The name "" is the model itself: then nothing is changed
    and its replacement is returned. References that are not registered submodules (a plain list, a closure) stay with
    the old module.

    Args:
        model: any module.
        replacements: the new module for each name, one name for a shared one.

    Raises:
        AttributeError: `model` has no module of that name. Nothing was replaced.
        ValueError: a name is what `torch.compile` wrapped, and the compiled call would go on running the old module.
            Nothing was replaced.
    """
    if "" in replacements:
        return replacements[""]
    new_modules = {model.get_submodule(name): new for name, new in replacements.items()}
    everywhere = model.named_modules(remove_duplicate=False)
    places = {name: new_modules[old] for name, old in everywhere if old in new_modules}
    compiled = [name for name in places if name.rpartition(".")[2] == "_orig_mod"]
    if compiled:
        raise ValueError(f"model holds torch.compile(...) right around {', '.join(compiled)}; replace it, then compile")
    for name, new in places.items():
        model.set_submodule(name, new)
    return model


def copy_with_replacements(model: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """Return a deep copy of `model` with replaced modules; `model` stays as it is.

    Every reference to an old module that the copy reaches is one to the new module: under each name, in plain lists, in
    bound methods such as hooks. Parameters, buffers and tensors that a module holds as an attribute, or in lists,
    tuples, sets, deques and dicts there, are shared with `model`, not copied; so are the replacements themselves.

    Args:
        model: any module.
        replacements: the new module for each name, one name for a shared one; "" is the model itself.

    Raises:
        AttributeError: `model` has no module of that name.
        TypeError: an attribute of a module cannot be copied, such as a lock.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in _held_tensors(model)}
    memo |= {id(model.get_submodule(name)): new for name, new in replacements.items()}
    try:
        return copy.deepcopy(model, dict(memo))
    except Exception:
        _raise_for_uncopyable_attribute(model, memo)
        raise


def _held_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield every tensor that the modules of `model` hold, in containers inside each other too."""
    pending: list[Any] = [model]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, nn.Module):
            pending.append(vars(value))
        elif isinstance(value, dict):
            pending += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset, collections.deque)):
            pending += value


def _raise_for_uncopyable_attribute(model: nn.Module, memo: Mapping[int, Any]) -> None:
    """Name the attribute on which a deep copy of `model` failed, if it is one by itself."""
    modules = {id(module): module for module in model.modules()}
    for name, module in model.named_modules():
        if id(module) in memo:  # is replaced
            continue
        for attribute, value in vars(module).items():
            try:
                copy.deepcopy(value, {**modules, **memo})
            except Exception as error:
                place = ".".join(filter(None, ("model", name, attribute)))
                raise TypeError(
                    f"model cannot be copied: {place} holds a {type(value).__name__} ({error}). Convert the layer "
                    "itself and put the result in its place, as in model.rnn = to_sparse(model.rnn)"
                ) from error


def take_hooks(new: nn.Module, old: nn.Module) -> None:
    """Let `new` call what `old` calls before and after forward.

    Args:
        new: called with the same arguments and giving the same results as `old`.
        old: keeps its hooks.
    """
    for kind in (
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
    ):
        getattr(new, kind).update(getattr(old, kind))
