"""The pruner's state as plain values: written by `pack_state`, checked whole by `unpack_state`."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from triton_sparse_rnn.pruning.masks import pack_bits, unpack_bits
from triton_sparse_rnn.pruning.targets import Weight
from triton_sparse_rnn.pruning.weight_masks import WeightMasks
from triton_sparse_rnn.sparse.patterns import Pattern

VERSION = 1


def pack_state(
    step_count: int, settings: dict[str, Any], weights: tuple[Weight, ...], masks: WeightMasks
) -> dict[str, Any]:
    """Gather a checkpoint of plain values and uint8 tensors; see `Pruner.state_dict`."""
    described = {weight.name: _describe(weight) | _pack_masks(weight, masks) for weight in weights}
    return {"version": VERSION, "step_count": step_count, "settings": settings, "weights": described}


def unpack_state(
    state: Mapping[str, Any],
    settings: dict[str, Any],
    weights: tuple[Weight, ...],
    pattern: Pattern,
    unit_masks: Mapping[str, Tensor],
) -> tuple[int, dict[str, tuple[Tensor, Tensor | None]]]:
    """Check a checkpoint against this pruner and the weights as they are; the inputs stay as they are.

    Returns:
        Its step count, and by name what `WeightMasks.load` takes.

    Raises:
        TypeError, ValueError: see `Pruner.load_state_dict`.
    """
    _check_keys("state_dict", state, {"version", "step_count", "settings", "weights"})
    _check_plain("state_dict['version']", state["version"], VERSION)
    if state["version"] != VERSION:
        raise ValueError(f"state_dict has version {state['version']!r}, this package reads {VERSION}")
    step_count = state["step_count"]
    if isinstance(step_count, bool) or not isinstance(step_count, int) or step_count < 0:
        raise ValueError(f"state_dict['step_count'] must be an integer from 0, got {step_count!r}")
    _check_same("settings", state["settings"], settings)
    _check_keys("state_dict['weights']", state["weights"], {weight.name for weight in weights})
    masks = {}
    for weight in weights:
        saved = state["weights"][weight.name]
        expected = _describe(weight)
        more = {"kept"} if pattern.follows_weights and isinstance(saved, Mapping) and "kept" in saved else set()
        _check_keys(weight.name, saved, {*expected, "mask", *more})
        _check_same(weight.name, {key: saved[key] for key in expected}, expected)
        try:
            unit_mask = unpack_bits(saved["mask"], tuple(unit_masks[weight.name].shape), "units")
            kept = unpack_bits(saved["kept"], tuple(weight.parameter.shape), "weights") if more else None
        except ValueError as error:
            raise ValueError(f"state_dict has a damaged mask for {weight.name}: {error}") from None
        if pattern.follows_weights:
            _check_fit(weight, pattern, unit_mask, kept)
        masks[weight.name] = unit_mask, kept
    return step_count, masks


def _pack_masks(weight: Weight, masks: WeightMasks) -> dict[str, Tensor]:
    kept = masks.untold(weight)
    packed = {"mask": pack_bits(masks.of_units[weight.name])}
    return packed if kept is None else packed | {"kept": pack_bits(kept)}


def _check_fit(weight: Weight, pattern: Pattern, unit_mask: Tensor, kept: Tensor | None) -> None:
    """Raise ValueError unless the mask is one of the pattern's, and says with the weights which of them are kept."""
    nonzero = weight.stacked(kept).ne(0)
    every_gate = weight.every_gate(unit_mask).to(nonzero.device)
    spread = pattern.spread(every_gate, nonzero)
    if not torch.equal(pattern.kept(spread), every_gate) or (kept is not None and not torch.equal(spread, nonzero)):
        raise ValueError(f"state_dict has a damaged mask for {weight.name}: it is none of {pattern!r}")
    if kept is None and not every_gate.all() and not torch.equal(spread, nonzero):
        raise ValueError(
            f"state_dict has a mask for {weight.name} that does not fit its zeros: load the model's state_dict first"
        )


def _describe(weight: Weight) -> dict[str, Any]:
    return {"shape": list(weight.parameter.shape), "schedules": [repr(schedule) for schedule in weight.schedules]}


def _check_keys(where: str, found: object, expected: set[str]) -> None:
    if not isinstance(found, Mapping):
        raise TypeError(f"{where} must be a mapping, got {type(found).__name__}")
    if set(found) != expected:
        missing = ", ".join(sorted(expected - set(found))) or "none"
        unexpected = ", ".join(sorted(map(str, set(found) - expected))) or "none"
        raise ValueError(f"{where} does not fit this pruner: missing {missing}; unexpected {unexpected}")


def _check_plain(where: str, found: object, expected: object) -> None:
    if not is_plain(found):
        raise TypeError(f"{where} must be {expected!r}, as this pruner has it, got a {type(found).__name__}")


def is_plain(value: object) -> bool:
    """Whether `value` is a number, a text or None, or a list or tuple of these: what `==` gives a single answer for.

    >>> is_plain([16, 1]), is_plain({}), is_plain([[1]])
    (True, False, False)
    """
    values = value if isinstance(value, (list, tuple)) else (value,)
    return all(one is None or isinstance(one, (str, numbers.Number)) for one in values)


def _check_same(where: str, found: object, expected: dict[str, Any]) -> None:
    _check_keys(where, found, set(expected))
    assert isinstance(found, Mapping)
    for key, value in expected.items():
        _check_plain(f"{where}[{key!r}] in state_dict", found[key], value)
        if found[key] != value:
            raise ValueError(f"{where} has {key}={found[key]!r} in state_dict, but this pruner has {value!r}")
