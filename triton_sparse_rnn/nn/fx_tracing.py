"""Calls of a converted layer that torch.fx traces: the layer becomes one node of the graph, as torch.nn's layers do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.fx import Proxy, Tracer  # torch has loaded it by itself


def find_proxy(values: Iterable[Any]) -> Proxy | None:
    """Return the first value that torch.fx traces among arguments, in the tuples and lists among them too."""
    for value in values:
        if isinstance(value, Proxy):
            return value
        if isinstance(value, (tuple, list)) and (proxy := find_proxy(value)) is not None:
            return proxy
    return None


def tracer_of(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Tracer | None:
    """Return who traces a call with these arguments; None for a call that is to run."""
    proxy = find_proxy((*args, *kwargs.values()))
    return proxy.tracer if proxy is not None and isinstance(proxy.tracer, Tracer) else None


def record_call(tracer: Tracer, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Proxy:
    """Let the graph call `layer`, its hooks included."""
    return tracer.create_proxy("call_module", _path(tracer, layer), args, kwargs)


def record_method(
    tracer: Tracer, layer: nn.Module, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Proxy:
    """Let the graph call a method of `layer`."""
    owner = tracer.create_proxy("get_attr", _path(tracer, layer), (), {})
    return tracer.create_proxy("call_method", method, (owner, *args), kwargs)


def _path(tracer: Tracer, layer: nn.Module) -> str:
    path = tracer.path_of_module(layer)
    if not path:
        raise RuntimeError(
            f"torch.fx cannot trace a {type(layer).__name__} by itself, as it cannot an nn.GRU: trace a module that "
            "holds it, such as nn.Sequential(layer)"
        )
    return path
