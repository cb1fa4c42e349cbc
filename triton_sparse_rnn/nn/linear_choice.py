"""Which linear layers of a model `to_sparse` converts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from triton_sparse_rnn.names import clean_name
from triton_sparse_rnn.nn.linear_layers import FilterFn, included_layers, is_linear, named_linear_layers, reader_of
from triton_sparse_rnn.nn.linear_storage import gains
from triton_sparse_rnn.notices import about_layer
from triton_sparse_rnn.ops.validation import check_activation_dtype
from triton_sparse_rnn.sparse.block_matrix import STORAGE_DTYPES

_PRUNED_ABOVE = 0.5  # the fraction of zeros from which a layer that nobody named is taken for a pruned one


class LinearChoice(NamedTuple):
    """The layers to convert by name, and what is to be said of others."""

    chosen: dict[str, nn.Module]
    left: list[str]


def choose_linear_layers(
    model: nn.Module, include: Iterable[str] | None, filter_fn: FilterFn | None, options: Mapping[str, Any]
) -> LinearChoice:
    """Choose the linear layers of a model; arguments as for `to_sparse`, with all options.

    Raises:
        TypeError, ValueError: `include` holds no globs, or one that matches no matrix; or a hook computes a weight.
    """
    layers: dict[str, nn.Module] = {**named_linear_layers(model)}
    unfit: list[str] = []
    if is_linear(model) and include is None:
        named = {""}
    elif include is not None:
        named, unfit = included_layers(model, include)
    else:
        named = set() if filter_fn is None else set(layers)
    if filter_fn is not None:
        named = {name for name in layers if name in named and filter_fn(layers[name], name)}
    left = [f"{'; '.join(unfit)}"] if unfit else []
    chosen = {}
    for name, layer in layers.items():
        if name not in named:
            continue
        if (reader := reader_of(model, name)) is not None:
            left.append(f"the weight of '{clean_name(name)}' is read by the {reader} around it, which does not call it")
        elif _is_asked_to_store(layer, options) or _gains(name, layer, options):
            chosen[name] = layer
        elif include is not None or name == "":
            left.append(
                f"{_shown(name)} would be no faster, with {_zeros(layer):.0%} zeros: prune more of it, or name "
                "a storage for it, as in storage=Blocks(16, 1), and it is stored all the same"
            )
    if include is None and filter_fn is None and (pruned := _pruned(model, layers, named, options)):
        globs = ", ".join(repr(f"{name}.weight") for name in pruned)
        left.append(
            f"{', '.join(map(repr, pruned))} {'is a' if len(pruned) == 1 else 'are'} linear layer"
            f"{'' if len(pruned) == 1 else 's'} of mostly zeros: include=({globs},) converts them too, and include=() "
            "says nothing of them"
        )
    return LinearChoice(chosen, left)


def _shown(name: str) -> str:
    return f"'{clean_name(name)}'" if name else "the layer"


def _is_asked_to_store(layer: Any, options: Mapping[str, Any]) -> bool:
    """Whether the weight is to be stored, whatever the estimate says: as a weight_ih is."""
    return options["storage"] is not None or options["weight_dtype"] not in (None, layer.weight.dtype)


def _gains(name: str, layer: nn.Module, options: Mapping[str, Any]) -> bool:
    activation_dtype = check_activation_dtype(options["activation_dtype"], torch.int8)
    with about_layer(clean_name(name)):
        return gains(layer, backend=options["backend"], activation_dtype=activation_dtype)


def _zeros(layer: Any) -> float:
    weight = layer.weight.detach()
    return 1 - int(weight.count_nonzero()) / weight.numel()


def _pruned(
    model: nn.Module, layers: Mapping[str, nn.Module], named: set[str], options: Mapping[str, Any]
) -> list[str]:
    """Names of layers that were pruned, it seems, and could be converted."""
    found = []
    for name, layer in layers.items():
        if name in named or not _is_plain(layer._parameters.get("weight")) or reader_of(model, name) is not None:
            continue
        if _PRUNED_ABOVE < _zeros(layer) < 1 and _gains(name, layer, options):
            found.append(clean_name(name))
    return found


def _is_plain(weight: Tensor | None) -> bool:
    """Whether it is a parameter whose zeros can be counted: not computed, sharded, on the meta device, or quantised."""
    return (
        type(weight) is nn.Parameter
        and weight.layout == torch.strided
        and not weight.is_meta
        and weight.dtype in STORAGE_DTYPES
    )
