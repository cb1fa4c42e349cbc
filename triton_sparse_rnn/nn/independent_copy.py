"""Copy a model with other layers in the places of some, so that the copy shares nothing with the model."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from triton_sparse_rnn.nn.held_objects import UNCOPIED, copied_attributes, copied_objects, referred_modules
from triton_sparse_rnn.nn.instance_state import HOOKS, added_state, take_over
from triton_sparse_rnn.notices import in_layer, warn

_INSTEAD = "convert the layer itself and put the result in its place, as in model.rnn = to_sparse(model.rnn)"


def copy_with_replacements(
    model: nn.Module, replacements: Mapping[str, nn.Module], changed: Iterable[nn.Module] = ()
) -> nn.Module:
    """Return a deep copy of `model` with replaced layers; `model` stays as it is.

    Every reference to an old module that the copy reaches is one to the new module: under each name, in plain lists, in
    bound methods such as hooks. A replacement takes over what was added to the layer in whose place it is. Nothing is
    shared: tensors are copied as copy.deepcopy does, those that are the result of a computation are detached, and
    gradients are left out.

    For a layer by itself, modules that it refers to outside of it stay those that they are, and so do its hooks unless
    they refer to it.

    Args:
        model: any module.
        replacements: the new layer for each name, one name for a shared one; "" is the model itself.
        changed: other layers of the model, whose copies the caller will change.

    Raises:
        AttributeError: `model` has no module of that name.
        TypeError: a module holds what cannot be copied, such as a lock, or a function that refers to a module that
            changes in the copy.
    """
    replaced = {model.get_submodule(name): new for name, new in replacements.items()}
    memo: dict[int, Any] = {id(old): new for old, new in replaced.items()}
    refusal = _prepare(model, replaced, {*replaced, *changed}, memo)
    prepared = dict(memo)
    if refusal is not None:
        _raise_for_what_cannot_be_copied(model, replaced, prepared)  # says more, if it is that
        raise refusal
    try:
        copied = copy.deepcopy(model, memo)
        for old, new in replaced.items():
            take_over(new, old, lambda value: copy.deepcopy(value, memo))
    except Exception:
        _raise_for_what_cannot_be_copied(model, replaced, prepared)
        raise
    return copied


def _prepare(
    model: nn.Module, replaced: Mapping[nn.Module, nn.Module], changed: Collection[nn.Module], memo: dict[int, Any]
) -> TypeError | None:
    """Fill `memo` with what deepcopy cannot or should not copy; return an error if a function holds what changes."""
    names = {module: name for name, module in model.named_modules()}
    changing = {module for module in names if any(part in changed for part in module.modules())}
    inside, seen, sharing, refusals = {*map(id, names)}, {}, {}, []
    stop, alone = set(inside), model in replaced
    for place, value in _holdings(model, replaced):
        for held in copied_objects(value, stop, seen):
            if isinstance(held, Tensor):
                _prepare_tensor(held, memo)
            elif isinstance(held, UNCOPIED):
                for how, module in referred_modules(held):
                    if module in changing:
                        refusals.append(_refusal(place, held, names[module], how))
                    elif module in names and any(part._parameters or part._buffers for part in module.modules()):
                        sharing[place] = names[module]
            elif alone and isinstance(held, nn.Module) and id(held) not in inside:
                memo[id(held)] = held
                stop.add(id(held))
    if alone:
        for hooks in added_state(model).hooks.values():
            for hook in hooks.values():
                if not any(id(held) in inside for held in copied_objects(hook, stop, {})):
                    memo[id(hook)] = hook
    if refusals:
        return refusals[0]
    if sharing:
        held_there = ", ".join(f"{place} (model.{name})" for place, name in sharing.items())
        warn(
            f"functions are not copied, and these refer to modules of the original, whose later changes the copy will "
            f"follow: {held_there}; set them on the copy again"
        )
    return None


def _holdings(model: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of what the modules of the copy get, of those that are replaced what was added."""
    for name, module in model.named_modules():
        state = added_state(module).holdings() if module in replaced else copied_attributes(module)
        path = in_layer(name) if model in replaced else name
        for attribute, value in state.items():
            yield ".".join(filter(None, ("model", path, attribute))), value


def _prepare_tensor(tensor: Tensor, memo: dict[int, Any]) -> None:
    """Copy a tensor that deepcopy refuses, or would copy with its gradient."""
    if isinstance(tensor, nn.Parameter) or id(tensor) in memo:
        return
    if not tensor.is_leaf:
        memo[id(tensor)] = _copied_values(tensor.detach(), memo)
    elif tensor.layout is not torch.strided or tensor.grad is not None:
        memo[id(tensor)] = _copied_values(tensor.detach(), memo).requires_grad_(tensor.requires_grad)


def _copied_values(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    # With the memo, views of one storage stay views of one.
    return copy.deepcopy(tensor, memo) if tensor.layout is torch.strided else tensor.clone()


def _refusal(place: str, function: Any, name: str, how: str) -> TypeError:
    which = f"model.{name}" if name else "the model itself"
    kind = f"{type(function).__name__} '{getattr(function, '__qualname__', '')}'".removesuffix(" ''")
    first = "Remove that hook" if place.rpartition(".")[2] in HOOKS else f"Take it away (del {place})"
    return TypeError(
        f"model cannot be copied: {place} holds a {kind}, which refers to {which} {how}, and the copy would go on "
        f"running the original. {first} and set it on the copy again, or {_INSTEAD}"
    )


def _raise_for_what_cannot_be_copied(
    model: nn.Module, replaced: Mapping[nn.Module, nn.Module], memo: Mapping[int, Any]
) -> None:
    """Name the attribute on which a deep copy of `model` failed, if it is one by itself."""
    modules = {id(module): module for module in model.modules()}
    for place, value in _holdings(model, replaced):
        try:
            copy.deepcopy(value, {**modules, **memo})
        except Exception as error:
            raise TypeError(
                f"model cannot be copied: {place} holds a {type(value).__name__} ({error}). Take it away first, or "
                f"{_INSTEAD}"
            ) from error
