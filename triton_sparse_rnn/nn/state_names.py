"""Under which names of a state_dict the tensors of a layer stand.

They need not be those of named_modules(): hooks and wrappers may rename. But state_dict(keep_vars=True) has the very
tensors of the modules, and so shows whose they are.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from triton_sparse_rnn.names import clean_names
from triton_sparse_rnn.nn.instance_state import own_tensors
from triton_sparse_rnn.nn.storage import buffer_names
from triton_sparse_rnn.sparse.linear_config import config_of

LayerT = TypeVar("LayerT", bound=nn.Module)


def saved_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a layer, dense or persistent, as far as they belong into a state_dict."""
    own, held = own_tensors(layer), layer._parameters | layer._buffers
    return {
        name: tensor
        for name, tensor in held.items()
        if tensor is not None and name in own and name not in layer._non_persistent_buffers_set
    }


def names_in_file(state: Mapping[str, Any], layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the name without wrappers of each key of a state_dict, and of what its layers may be stored in.

    So two names that would become one stay as they are for a dense model as for a converted one.

    Args:
        state: of a model.
        layers: its recurrent and linear layers by prefix.
    """
    stored = (f"{prefix}{name}" for prefix, layer in layers.items() for name in buffer_names(config_of(layer)))
    return clean_names({**state, **dict.fromkeys(stored)})


def layers_by_prefix(
    model: nn.Module, state: Mapping[str, Any], layers: Iterable[LayerT]
) -> tuple[dict[str, LayerT], list[LayerT]]:
    """Find recurrent and linear layers in a state_dict.

    Args:
        model: that they are in.
        state: model.state_dict(keep_vars=True).
        layers: to look for, each once.
    Returns:
        The layer for each prefix that its weights have, such as "encoder.rnn.", a shared layer under several; and the
        layers that are not found.

    >>> model = nn.Sequential(nn.GRU(2, 3))
    >>> list(layers_by_prefix(model, model.state_dict(keep_vars=True), [model[0]])[0])
    ['0.']
    """
    keys: dict[int, list[str]] = collections.defaultdict(list)
    for key, value in state.items():
        keys[id(value)].append(key)
    places = {(f"{name}." if name else "", module) for name, module in model.named_modules(remove_duplicate=False)}
    found: dict[str, LayerT] = {}
    missing = []
    for layer in layers:
        prefixes = [
            {key.removesuffix(name) for key in keys[id(tensor)] if f".{key}".endswith(f".{name}")}
            for name, tensor in saved_tensors(layer).items()
        ]
        common = set.intersection(*prefixes) if prefixes else set()
        if not common:
            missing.append(layer)
        for prefix in common:  # of layers that have all weights in common, each keeps its own place
            if prefix not in found or (prefix, layer) in places:
                found[prefix] = layer
    return found, missing
