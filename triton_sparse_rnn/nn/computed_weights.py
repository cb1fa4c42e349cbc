"""Weights that are no parameters but computed: by a parametrization, weight norm, spectral norm or torch's pruning."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from triton_sparse_rnn.nn.replace import added_members
from triton_sparse_rnn.notices import in_layer

if TYPE_CHECKING:
    from typing import TypeGuard

TensorT = TypeVar("TensorT")
_MATRIX = r"weight_(?:ih|hh|hr)(?:_l\d+(?:_reverse)?)?"
_BY_HOOK = re.compile(rf"(?P<weight>.*\b{_MATRIX})_(?P<part>orig|g)")
_PARAMETRIZED = re.compile(rf"(?P<prefix>.*)\bparametrizations\.(?P<weight>{_MATRIX})\..*")


class ComputedWeight(NamedTuple):
    """What computes a weight, and from what."""

    parts: tuple[str, ...]  # the names of its tensors in the layer's state_dict
    removal: str  # the call that makes it a parameter again
    hook: Any = None  # a forward pre-hook; None of a parametrization, which computes at every access


def computed_weight(layer: nn.Module, name: str) -> ComputedWeight | None:
    """Return what computes a weight; None of a parameter, and of one that something unknown computes."""
    if name in layer._parameters:
        return None
    if is_parametrized(layer, name):
        parts = layer.parametrizations[name].state_dict()  # type: ignore[index, reportIndexIssue]
        names = tuple(f"parametrizations.{name}.{part}" for part in parts)
        return ComputedWeight(names, "torch.nn.utils.parametrize.remove_parametrizations")
    from torch.nn.utils.prune import BasePruningMethod
    from torch.nn.utils.spectral_norm import SpectralNorm
    from torch.nn.utils.weight_norm import WeightNorm

    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == name:
            return ComputedWeight((f"{name}_g", f"{name}_v"), "torch.nn.utils.remove_weight_norm", hook)
        if isinstance(hook, SpectralNorm) and hook.name == name:
            names = (f"{name}_orig", f"{name}_u", f"{name}_v")
            return ComputedWeight(names, "torch.nn.utils.remove_spectral_norm", hook)
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
            return ComputedWeight((f"{name}_orig", f"{name}_mask"), "torch.nn.utils.prune.remove", hook)
    return None


def check_not_by_hook(layer: nn.Module, name: str) -> None:
    """Raise ValueError for a weight that is computed before each call; a parametrization computes at every access."""
    computed = computed_weight(layer, name)
    if name in layer._parameters or (computed is not None and computed.hook is None):
        return
    owner = f"model.get_submodule({path!r})" if (path := in_layer("")) else "layer"
    if computed is None:
        raise ValueError(
            f"{in_layer(name)} is no parameter, but computed by something unknown: make it one first, by "
            f"{owner}.register_parameter({name!r}, ...)"
        )
    raise ValueError(
        f"{in_layer(name)} is computed by a hook before each call, from {' and '.join(computed.parts)}: make it a "
        f"parameter again by {computed.removal}({owner}, {name!r}), of a copy if training goes on"
    )


@torch.no_grad()
def read_weight(layer: nn.Module, name: str) -> Tensor:
    """Return a weight as it is in inference now, detached.

    One that a hook computes is what the last call left, or not there yet, so it is computed anew. Looking changes
    nothing: a spectral norm in training makes a step of its own at each access.
    """
    computed = computed_weight(layer, name)
    if computed is None:
        return getattr(layer, name).detach()
    if computed.hook is not None:
        compute = getattr(computed.hook, "apply_mask", None) or computed.hook.compute_weight
        return (compute(layer, False) if "spectral" in computed.removal else compute(layer)).detach()
    modules = [*layer.parametrizations[name].modules()]  # type: ignore[index, reportIndexIssue]
    training = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        return getattr(layer, name).detach()
    finally:
        for module, flag in zip(modules, training, strict=True):
            module.training = flag


def lost_members(layer: nn.Module, base: type[nn.Module]) -> list[str]:
    """Return `added_members` without those by which a parametrized layer computes its weights."""
    computed = vars(type(layer)) if is_parametrized(layer) else {}
    return [name for name in added_members(layer, base) if name not in computed]


def with_computed_weights(
    model: nn.Module, tensors: Mapping[str, TensorT], name_of: Callable[[str], str]
) -> dict[str, TensorT | Tensor]:
    """Put the computed weights of recurrent layers and cells among tensors by name, in the place of their parts.

    Args:
        model: whose layers compute them.
        tensors: its state_dict.
        name_of: gives the name in it of a path in the model.
    """
    found: dict[str, TensorT | Tensor] = {**tensors}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            prefix = f"{path_in_state}." if (path_in_state := name_of(path)) else ""
            names = module._flat_weights_names if isinstance(module, nn.RNNBase) else ("weight_ih", "weight_hh")
            for name in names:
                if (computed := computed_weight(module, name)) is not None:
                    parts = [prefix + part for part in computed.parts]
                    found = _joined(found, parts, prefix + name, read_weight(module, name))
    return found


def join_parts(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Compute what the parts in a state_dict tell: weights under torch's pruning and weight norm.

    Returns:
        The tensors, with such weights in the place of their parts, and the names of weights that a parametrization
        computes, which a state_dict does not tell.
    """
    found = dict(tensors)
    for name, first in tensors.items():
        if (match := _BY_HOOK.fullmatch(name)) is not None:
            second_name = f"{match['weight']}_{'mask' if match['part'] == 'orig' else 'v'}"
            compute = _masked if match["part"] == "orig" else _normed
            if (weight := compute(first, tensors.get(second_name))) is not None:
                found = _joined(found, [name, second_name], match["weight"], weight)
    matches = (_PARAMETRIZED.fullmatch(name) for name in tensors)
    unknown = dict.fromkeys(match["prefix"] + match["weight"] for match in matches if match is not None)
    return found, tuple(unknown)


def _masked(original: object, mask: object) -> Tensor | None:
    """What torch.nn.utils.prune computes; None of tensors that are not its parts."""
    if not _is_plain(original) or not isinstance(mask, Tensor) or mask.shape != original.shape:
        return None
    return original * mask.to(original.dtype)


def _normed(g: object, v: object) -> Tensor | None:
    """What torch.nn.utils.weight_norm computes, w = g v / |v|; None of tensors that are not its parts."""
    if not _is_plain(g) or not _is_plain(v):
        return None
    if g.dim() != 0 and (g.dim() != v.dim() or any(a not in (1, b) for a, b in zip(g.shape, v.shape, strict=True))):
        return None
    axes = [axis for axis in range(v.dim()) if g.dim() == 0 or g.shape[axis] == 1]
    return v * (g / torch.linalg.vector_norm(v, dim=axes, keepdim=True)) if axes else None


def _is_plain(value: object) -> TypeGuard[Tensor]:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_nested:
        return False
    return value.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _joined(tensors: dict[str, Any], parts: Iterable[str], name: str, weight: Tensor) -> dict[str, Any]:
    """Put `weight` where the first of its parts is, and leave these out."""
    gone = set(parts)
    joined: dict[str, Any] = {}
    for key, value in tensors.items():
        if key in gone:
            joined.setdefault(name, weight)
        else:
            joined[key] = value
    return joined
