"""The options of a conversion: every function that takes them hands them on as they came."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypedDict, TypeVar

import torch

from triton_sparse_rnn.sparse.patterns import PatternLike

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


class ConversionOptions(TypedDict, total=False):
    """Keywords of `to_sparse` and `SparseGRU.to_sparse`; `PersistentGRU.from_dense` says what each of them means."""

    weight_dtype: torch.dtype | None
    storage: PatternLike | None
    backend: str | None
    activation_dtype: torch.dtype | None
    num_threads: int


DEFAULTS = ConversionOptions(weight_dtype=None, storage=None, backend=None, activation_dtype=None, num_threads=1)


def complete(function: str, options: ConversionOptions) -> dict[str, Any]:
    """Return options with the defaults of those that are missing.

    Raises:
        TypeError: there is no such option; it is named, and so is the function, as one that took **options.
    """
    if unknown := sorted(options.keys() - DEFAULTS.keys()):
        raise TypeError(
            f"{function}() got an unexpected keyword argument {unknown[0]!r}; its options are {', '.join(DEFAULTS)}"
        )
    return {**DEFAULTS, **options}


def shows_options(function: FunctionT) -> FunctionT:
    """Decorate a function that takes **options, so that its signature, as help() shows it, has each of them."""
    signature = inspect.signature(function)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    types = {name: hint.__forward_arg__ for name, hint in ConversionOptions.__annotations__.items()}
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=types[name])
        for name, default in DEFAULTS.items()
    ]
    function.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return function
