"""Teachers: which layers of a model they have too, and one made of the model itself."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from triton_sparse_rnn.names import clean_names, name_matches
from triton_sparse_rnn.nn.independent_copy import copy_with_replacements
from triton_sparse_rnn.notices import warn
from triton_sparse_rnn.pruning.recorded_calls import drop_hooks
from triton_sparse_rnn.pruning.weights import recurrent_weights
from triton_sparse_rnn.sparse.layer_config import LayerConfig

_FEW_ZEROS = 0.1  # of the weights of a model that is still dense; trained ones are hardly ever exactly 0
_SHARDED = ("DTensor", "FlatParameter")


def choose_layers(model: nn.Module, layers: Iterable[str] | None) -> dict[str, nn.RNNBase]:
    """Return by name the recurrent layers of a model that match any of the globs; for None all, if there are some."""
    found = _recurrent_layers(model)
    if layers is None:
        if not found:
            raise ValueError("model has no nn.RNN, nn.GRU or nn.LSTM to compare; layers=() is for `taught` alone")
        return found
    globs = tuple(layers) if isinstance(layers, Iterable) else (layers,)
    if isinstance(layers, str) or not all(isinstance(glob, str) for glob in globs):
        raise TypeError(f"layers must be a sequence of globs, such as ('encoder.*',), got {layers!r}")
    for glob in globs:
        if not any(name_matches(name, glob) for name in found):
            raise ValueError(f"layers has {glob!r}, which matches none of the recurrent layers {listed(found)}")
    return {name: layer for name, layer in found.items() if any(name_matches(name, glob) for glob in globs)}


def match_layers(model: nn.Module, found: dict[str, nn.RNNBase], teacher: nn.Module) -> dict[str, nn.RNNBase]:
    """Return the teacher's layers of the names that were found in the model, with outputs of the same size."""
    theirs = _recurrent_layers(teacher)
    way_out = (
        "leave it out by layers=, or teach by the predictions only: Distillation(model, teacher, layers=()), and "
        "divergence(scores, distillation.taught)"
    )
    for name, layer in found.items():
        if name not in theirs:
            raise ValueError(f"teacher has no recurrent layer {name!r}, only {listed(theirs) or 'none'}: {way_out}")
        sizes = [_output_size(one) for one in (layer, theirs[name])]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{name or 'the model'} returns {sizes[0]} values for each step, and {sizes[1]} in the teacher, so the "
                f"two cannot be compared: {way_out}"
            )
    matched = {name: theirs[name] for name in found}
    shared = ["the whole model"] if teacher is model else [name for name in found if matched[name] in found.values()]
    if shared:
        raise ValueError(
            f"teacher shares {listed(shared)} with the model, and would change as it does: leave teacher out for a "
            "copy of the model as it is now, or give copy.deepcopy(model)"
        )
    return matched


def frozen_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy in eval mode, without gradients; warn if it has many zeros, as after pruning.

    Raises:
        TypeError: the model cannot be copied, is sharded, or the copy would go on running a part of the original.
    """
    for path, parameter in model.named_parameters():
        if type(parameter).__name__ in _SHARDED:
            raise TypeError(
                f"{path} is sharded, a {type(parameter).__name__}, and model cannot be copied: make the teacher before "
                "it is, and give it: Distillation(model, teacher)"
            )
    try:
        copied = copy_with_replacements(model, {}, changed=model.modules())
    except Exception as error:
        reason = str(error).partition(". ")[0]
        raise TypeError(f"{reason}; make the teacher yourself, and give it: Distillation(model, teacher)") from error
    drop_hooks(copied)
    weights = [getattr(module, name).detach() for _, module, name in recurrent_weights(copied)]
    weights = [weight for weight in weights if not weight.is_meta]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / max(1, sum(weight.numel() for weight in weights))
    if zeros > _FEW_ZEROS:
        warn(
            f"{100 * zeros:.0f} % of the recurrent and input weights of model are zeros, so its copy is no dense "
            "teacher: where a training is resumed, give the dense model, Distillation(model, teacher)"
        )
    return copied.requires_grad_(False).eval()


def place_of(model: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Device and dtype of the first floating-point parameter."""
    first = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    return (None, None) if first is None else (first.device, first.dtype)


def listed(names: Iterable[str]) -> str:
    """Return names of layers for a message; "" is a model that is a layer itself."""
    return ", ".join(name or "the model itself" for name in names)


def _recurrent_layers(model: nn.Module) -> dict[str, nn.RNNBase]:
    found = {path: module for path, module in model.named_modules() if isinstance(module, nn.RNNBase)}
    return {name: found[path] for path, name in clean_names(found).items()}


def _output_size(layer: nn.RNNBase) -> int:
    config = LayerConfig.of(layer)
    return config.state_sizes[0] * config.directions
