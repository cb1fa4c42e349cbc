"""Under which names of a state_dict the tensors of a layer stand.

They need not be those of named_modules(): hooks and wrappers may rename. But state_dict(keep_vars=True) has the very
tensors of the modules, and so shows whose they are.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from triton_sparse_rnn.nn.instance_state import own_tensors


def saved_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a recurrent layer, dense or persistent, as far as they belong into a state_dict."""
    own, held = own_tensors(layer), layer._parameters | layer._buffers
    return {
        name: tensor
        for name, tensor in held.items()
        if tensor is not None and name in own and name not in layer._non_persistent_buffers_set
    }


def layers_by_prefix(
    model: nn.Module, state: Mapping[str, Any], layers: Iterable[nn.Module]
) -> tuple[dict[str, nn.Module], list[nn.Module]]:
    """Find recurrent layers in a state_dict.

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
    found: dict[str, nn.Module] = {}
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
