"""What an object holds: what copy.deepcopy goes on to, and the modules that functions refer to.

copy.deepcopy copies containers, objects, bound methods and functools.partial. Functions it does not copy, nor weak
references: the copy of a model goes on calling the very function, and with it the old modules in its closure.
"""

from __future__ import annotations

import collections
import functools
import types
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

_CACHED_FUNCTION = type(functools.lru_cache(maxsize=None)(len))
# What deepcopy hands on as it is, although it may refer to a module:
UNCOPIED = (types.FunctionType, types.BuiltinFunctionType, _CACHED_FUNCTION, weakref.ref)
_ATOMS = (str, bytes, int, float, complex, type(None), type, types.ModuleType)
_OBJECT_GETSTATE = getattr(object, "__getstate__", None)  # since Python 3.11


def copied_objects(value: Any, stop: Collection[int], seen: dict[int, Any]) -> Iterator[Any]:
    """Yield `value` and whatever a deep copy of it reaches, each object once.

    Args:
        value: anything.
        stop: the id of objects that are yielded, but not looked into; may be extended meanwhile.
        seen: what was yielded before, by id; it is extended.
    """

    def parts(part: Any) -> Iterable[Any]:
        return () if id(part) in stop or isinstance(part, UNCOPIED) else _parts(part, _copied_state)

    return _walk(value, parts, seen)


def referred_modules(function: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield (how it is held, module) of the modules that an object of the types UNCOPIED refers to.

    Global names that a function reads do not count, and a module is not looked into.

    >>> layer = nn.GRU(2, 3)
    >>> [how for how, module in referred_modules(lambda x, layer=layer: layer(x))]
    ['by a default argument']
    """
    seen = {id(function): function}
    for how, held in _references(function):
        for part in _walk(held, _referred_parts, seen):
            if issubclass(type(part), nn.Module):
                yield how, part


def _walk(value: Any, parts: Callable[[Any], Iterable[Any]], seen: dict[int, Any]) -> Iterator[Any]:
    pending = [value]
    while pending:
        part = pending.pop()
        if issubclass(type(part), _ATOMS) or id(part) in seen:
            continue
        seen[id(part)] = part  # so it stays alive, and no other object gets its id
        yield part
        pending += parts(part)


def _references(function: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(function, weakref.ref):
        yield "weakly", function()
        return
    if isinstance(function, types.BuiltinFunctionType):
        yield "as its object", function.__self__
        return
    if isinstance(function, types.FunctionType):
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                yield f"by its variable '{name}'", cell.cell_contents
            except ValueError:  # nothing is assigned to it yet
                continue
        yield "by a default argument", [function.__defaults__, function.__kwdefaults__]
    for name, value in vars(function).items():
        yield f"by its attribute '{name}'", value


def _referred_parts(value: Any) -> Iterable[Any]:
    if issubclass(type(value), nn.Module):
        return ()
    return [held for _, held in _references(value)] if isinstance(value, UNCOPIED) else _parts(value, _whole_state)


def _parts(value: Any, state: Callable[[Any], Any]) -> list[Any]:
    kind = type(value)
    if issubclass(kind, Tensor):
        return []
    if kind is types.MethodType:
        return [value.__self__, value.__func__]
    parts: list[Any] = []
    try:
        if issubclass(kind, dict):
            parts += [*value.keys(), *value.values()]
        elif issubclass(kind, (list, tuple, set, frozenset, collections.deque)):
            parts += value
        elif issubclass(kind, functools.partial):
            parts += [value.func, value.args, value.keywords]
        parts += state(value)
    except Exception:  # of an odd class; the copy itself will say what is wrong with it
        return parts
    return parts


def copied_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that deepcopy copies of a module: some leave out what they make again."""
    (state,) = _copied_state(module) if _has_getstate(module) else (None,)
    return state if isinstance(state, dict) else vars(module)


def _has_getstate(value: Any) -> bool:
    own = getattr(type(value), "__getstate__", None)
    return own is not None and own is not _OBJECT_GETSTATE


def _copied_state(value: Any) -> list[Any]:
    """What deepcopy copies of an object's attributes."""
    if not _has_getstate(value):
        return _whole_state(value)
    try:
        return [value.__getstate__()]
    except Exception:  # DistributedDataParallel, for one, may refuse
        return [vars(value)]


def _whole_state(value: Any) -> list[Any]:
    """The values of all attributes that an object holds itself."""
    slots = (vars(cls).get("__slots__", ()) for cls in type(value).__mro__)
    names = (name for names in slots for name in ((names,) if isinstance(names, str) else names))
    held = [getattr(value, name) for name in names if name not in ("__dict__", "__weakref__") and hasattr(value, name)]
    return [*held, *getattr(value, "__dict__", {}).values()]
