"""Which parameters of a model are pruned, and by which schedule each of their gates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from triton_sparse_rnn.names import checked_globs, clean_name, name_matches
from triton_sparse_rnn.notices import warn
from triton_sparse_rnn.pruning.schedules import Schedule
from triton_sparse_rnn.pruning.weights import (
    find_parameter,
    gate_names,
    parameter_paths,
    recurrent_weights,
    split_gates,
)
from triton_sparse_rnn.sparse.patterns import Pattern

Target: TypeAlias = "Schedule | Mapping[str, Schedule | None] | None"


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A parameter to be pruned.

    Attributes:
        name: what users see and checkpoints hold: the path without the prefixes of wrappers.
        path: where the model has it.
        parameter: [G * H, C]; or [O, ...] of a parameter on request, taken as [O, C] with one gate.
        gate_names: one letter each; ("",) of a parameter on request.
        schedules: of each gate; None leaves it dense.
    """

    name: str
    path: str
    parameter: nn.Parameter
    gate_names: tuple[str, ...]
    schedules: tuple[Schedule | None, ...]

    @property
    def gates(self) -> int:
        return len(self.schedules)

    @property
    def layer(self) -> str:
        """What the weights of one layer and direction share: "rnn.weight_*_l0_reverse"; else the name."""
        prefix, _, attribute = self.name.rpartition("weight_")
        return self.name if self.gate_names == ("",) else f"{prefix}weight_*_{attribute.partition('_')[2]}"

    def stacked(self, tensor: Tensor | None = None) -> Tensor:
        """View the parameter, or another tensor of its shape, as [G, H, C]."""
        return split_gates(self.parameter.detach() if tensor is None else tensor, self.gates)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(H, C) of one gate."""
        return self.parameter.shape[0] // self.gates, self.parameter.shape[1:].numel()

    def every_gate(self, unit_mask: Tensor) -> Tensor:
        """View a pattern's mask [G or 1, ...] as [G, ...]."""
        return unit_mask.expand(self.gates, *unit_mask.shape[1:])

    def in_model(self, model: nn.Module) -> bool:
        """Whether the model still has this very parameter in its place."""
        return find_parameter(model, self.path) is self.parameter


def match_weights(
    model: nn.Module,
    schedule: Schedule | None,
    targets: Mapping[str, Target] | None,
    include: Iterable[str],
) -> tuple[Weight, ...]:
    """Find every weight to prune; arguments as for `Pruner`.

    Raises:
        TypeError, ValueError: naming the argument, or the parameter that cannot be pruned.
    """
    targets = {} if targets is None else targets
    _check_schedules(schedule, targets)
    globs = checked_globs(include)
    unused, found = set(targets), []
    for candidate in (*_recurrent(model), *_included(model, globs)):
        name = clean_name(candidate.path)
        pattern = next((pattern for pattern in targets if name_matches(name, pattern)), None)
        unused.discard(pattern)
        target = schedule if pattern is None else targets[pattern]
        schedules = _schedule_each_gate(name, candidate.gates, target, schedule)
        if any(one is not None for one in schedules):
            parameter = _checked_parameter(model, candidate)
            found.append(Weight(name, candidate.path, parameter, candidate.gates, schedules))
    if unused:
        raise ValueError(f"targets has globs that no weight is left for: {', '.join(map(repr, sorted(unused)))}")
    if not found:
        raise ValueError(
            "nothing to prune: model has no nn.RNN, nn.GRU or nn.LSTM with a schedule; "
            "name other parameters by include=('decoder.weight',)"
        )
    _check_distinct(found)
    return tuple(found)


def find_weights(where: str, source: nn.Module | Mapping[str, Tensor], weights: Iterable[Weight]) -> dict[str, Tensor]:
    """Return by name, out of another model or a state_dict, the tensors that stand for these weights.

    Raises:
        TypeError, ValueError: naming `where`, and the weight that it lacks, or has in another shape or no dense tensor
            with values for.
    """
    if not isinstance(source, (nn.Module, Mapping)):
        raise TypeError(f"{where} must be an nn.Module or a state_dict, got {type(source).__name__}")
    tensors = dict(source.named_parameters(remove_duplicate=False)) if isinstance(source, nn.Module) else source
    by_name = {clean_name(path): tensor for path, tensor in tensors.items()}
    found = {}
    for weight in weights:
        if weight.name not in by_name:
            raise ValueError(f"{where} lacks {weight.name}, which the pruner prunes")
        tensor = found[weight.name] = by_name[weight.name]
        if kind := _not_dense(tensor):
            raise TypeError(
                f"{where} must have a dense floating-point tensor with values for {weight.name}, got {kind}"
            )
        if tensor.shape != weight.parameter.shape:
            shape = tuple(tensor.shape)
            raise ValueError(f"{where} has {weight.name} of shape {shape}, expected {tuple(weight.parameter.shape)}")
    return found


def _not_dense(value: object) -> str | None:
    """What a value is, if it is no such tensor."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.is_nested or value.layout != torch.strided:
        return "a nested one" if value.is_nested else str(value.layout)
    if value.is_meta:
        return "one on the meta device"
    return None if value.is_floating_point() else str(value.dtype)


def warn_of_emptied_gates(weights: Iterable[Weight], pattern: Pattern, *, balanced: bool) -> None:
    """Warn of gates of which the final sparsity, rounded, leaves nothing."""
    for weight in weights:
        units = pattern.count_units(*weight.matrix_shape, balanced=balanced)
        part = "gate" if units == pattern.count_units(*weight.matrix_shape) else "unit group"
        emptied = []
        for gate, schedule in zip(weight.gate_names, weight.schedules, strict=True):
            sparsity = None if schedule is None else schedule.sparsity_at(schedule.last_step)
            if sparsity is not None and round(sparsity * units) == units:
                emptied.append(gate)
        if emptied:
            gates = f" in gates {', '.join(emptied)}" if emptied != [""] else ""
            warn(
                f"{weight.name} will be pruned to nothing{gates}: the final sparsity rounds to all there is, "
                f"{pattern.describe(units)} in each {part}; take a finer pattern, "
                f"or leave it dense by targets={{{weight.name!r}: None}}"
            )


def _check_schedules(schedule: Schedule | None, targets: Mapping[str, Target]) -> None:
    if not isinstance(targets, Mapping):
        raise TypeError(f"targets must map globs to schedules, got {type(targets).__name__}")
    _check_schedule("schedule", schedule)
    for pattern, target in targets.items():
        if not isinstance(pattern, str):
            raise TypeError(f"targets must map globs to schedules, got the key {pattern!r}")
        for value in target.values() if isinstance(target, Mapping) else (target,):
            _check_schedule(f"targets[{pattern!r}]", value)


def _check_schedule(where: str, value: object) -> None:
    if value is not None and not isinstance(value, Schedule):
        raise TypeError(f"{where} must be a schedule such as PolynomialDecay(...), or None, got {value!r}")


class _Candidate(NamedTuple):
    path: str
    gates: tuple[str, ...]
    rows: int | None  # G * H of a recurrent layer


def _recurrent(model: nn.Module) -> Iterator[_Candidate]:
    for path, module, _ in recurrent_weights(model):
        gates = tuple(gate_names(module))
        yield _Candidate(path, gates, len(gates) * module.hidden_size)


def _included(model: nn.Module, include: tuple[str, ...]) -> list[_Candidate]:
    """The matrices, other than recurrent and input weights, that `include` names; they have one gate, ""."""
    recurrent = {clean_name(path) for path, _, _ in recurrent_weights(model)}
    matrices: dict[tuple[str, nn.Parameter], str] = {}  # Fabric has everything under two paths with one name
    for path, parameter in parameter_paths(model):
        if parameter.dim() >= 2:
            matrices.setdefault((clean_name(path), parameter), path)
    chosen: dict[str, _Candidate] = {}
    for pattern in include:
        matched = {name: path for (name, _), path in matrices.items() if name_matches(name, pattern)}
        if not matched:
            raise ValueError(f"include has {pattern!r}, which matches no parameter of two dimensions or more")
        chosen.update({path: _Candidate(path, ("",), None) for name, path in matched.items() if name not in recurrent})
    return list(chosen.values())


def _schedule_each_gate(
    name: str, gates: tuple[str, ...], target: Target, default: Schedule | None
) -> tuple[Schedule | None, ...]:
    if not isinstance(target, Mapping):
        return (target,) * len(gates)
    unknown = sorted(str(gate) for gate in target if gate not in gates)
    if unknown:
        known = f"its gates are {', '.join(gates)}" if gates != ("",) else "it has no gates"
        raise ValueError(f"targets gives schedules to the gates {', '.join(unknown)} of {name}, but {known}")
    return tuple(target.get(gate, default) for gate in gates)


def _checked_parameter(model: nn.Module, candidate: _Candidate) -> nn.Parameter:
    name = clean_name(candidate.path)
    way_out = f"; targets={{{name!r}: None}} leaves it out"
    parameter = find_parameter(model, candidate.path)
    if parameter is None or "parametrizations" in candidate.path.split("."):
        raise ValueError(f"{name} is not a plain parameter: it is parametrized, normed or flattened{way_out}")
    if type(parameter) is not nn.Parameter:
        kind = type(parameter).__name__
        raise TypeError(
            f"{name} must be a plain nn.Parameter, got a {kind}, and sharded ones cannot be pruned{way_out}"
        )
    if not parameter.is_floating_point():
        raise TypeError(f"{name} must be a real floating-point parameter, got {parameter.dtype}{way_out}")
    if candidate.rows is not None and (parameter.dim() != 2 or parameter.shape[0] != candidate.rows):
        raise ValueError(f"{name} must have {candidate.rows} rows, got shape {tuple(parameter.shape)}{way_out}")
    if not parameter.requires_grad:
        raise ValueError(f"{name} is frozen (requires_grad is False): it could not adapt to being pruned{way_out}")
    return parameter


def _check_distinct(found: list[Weight]) -> None:
    by_name: dict[str, Weight] = {}
    by_id: dict[int, Weight] = {}
    for weight in found:
        if weight.name in by_name:
            raise ValueError(
                f"{by_name[weight.name].path} and {weight.path} are both called {weight.name} once the names that "
                "wrappers such as torch.compile and DistributedDataParallel add are left out; rename a submodule"
            )
        tied = by_id.get(id(weight.parameter))
        if tied is not None:
            raise ValueError(
                f"{tied.name} and {weight.name} are one tied parameter; "
                f"targets={{{weight.name!r}: None}} prunes it once, as {tied.name}"
            )
        by_name[weight.name] = by_id[id(weight.parameter)] = weight
