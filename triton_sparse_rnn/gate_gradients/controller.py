"""What a layer with a `gate_gradient` holds and changes: thresholds, counters and counts, as tensors on its device."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import RNNBase

from triton_sparse_rnn.gate_gradients.contract import Arriving, BackwardDirection, Decision, Gradients, Needed, Rule
from triton_sparse_rnn.gate_gradients.options import LARGEST, GateGradientSparsity, check_positive
from triton_sparse_rnn.gate_gradients.random import LOW_BITS, hash32, mix
from triton_sparse_rnn.gate_gradients.stats import (
    GateGradientStats,
    ZerosOfGates,
    macs_of_training,
    macs_per_gate_gradient,
)
from triton_sparse_rnn.gate_gradients.thresholds import HIGHEST, LOWEST, arriving_scale, fitting_log_thresholds
from triton_sparse_rnn.sparse.layer_config import GATE_NAMES

START = -3.0  # of log_thresholds, until they are calibrated
VERSION = 1
_TENSORS = ("steps", "log_thresholds", "last", "total")
_layers_given: dict[int, itertools.count[int]] = {}  # by id of the options


class GateGradientController:
    """Decides what becomes zero in every backward of one layer, as its options say: the layer's `contract.Control`.

    For K directions (of all layers of a stack) of G gates; row k of a tensor is direction k. The host reads the tensors
    once in training, after it set the thresholds by a first backward; what else it must know to go on, it counts
    itself.

    Attributes:
        options: the layer's `gate_gradient`.
        rule: what becomes zero in a sparse step.
        steps: [K], int64, backward passes begun. Random numbers depend on it.
        log_thresholds: [K, Q], float32, of a target; Q thresholds in a direction.
        last: [K, G + 3], int64, of the last backward: zeros of each gate, gate gradients per gate, redundant and all
            multiply-accumulates.
        total: [K, G + 3], float64, the sum over all backward passes.
        scale: [K], float32, size of the gradients that arrived last; not saved.
        calibrated: [K], whether a first backward has set the thresholds.
        likely_zeros: [K], share of zeros to expect.
        stream: the number that makes the random numbers of two layers differ. Layers that were given the same options
            are numbered as they come; it is saved, so what a loaded state draws does not depend on the order.
    """

    @torch.inference_mode(False)  # its tensors change in training
    def __init__(self, options: GateGradientSparsity, layer: RNNBase) -> None:
        """Begin anew for `layer`, an LSTM or GRU.

        Raises:
            ValueError: blocks of more units than the layer has.
        """
        options.check_layer(layer)
        suffixes = ("", "_reverse") if layer.bidirectional else ("",)
        self.options, self.rule = options, rule_of(options)
        self.gates = GATE_NAMES[layer.mode]
        self.names = [f"l{k}{suffix}" for k in range(layer.num_layers) for suffix in suffixes]
        self.hidden_size = layer.hidden_size
        K, G = len(self.names), len(self.gates)
        Q = G if self.rule.group == "elements" else 1
        self.steps = torch.zeros(K, dtype=torch.int64, device="cpu")
        self.log_thresholds = torch.full((K, Q), START, dtype=torch.float32, device="cpu")
        self.last = torch.zeros(K, G + 3, dtype=torch.int64, device="cpu")
        self.total = torch.zeros(K, G + 3, dtype=torch.float64, device="cpu")
        self.scale = torch.zeros(K, dtype=torch.float32, device="cpu")
        self.begun = [0] * K  # `steps`, as the host counts
        self.calibrated = [False] * K
        self.likely_zeros = [0.0] * K
        self.stream = mix(0, _number_of_layer(options))

    @property
    def backend(self) -> str | None:
        """As the options name it."""
        return self.options.backend

    @torch.no_grad()
    def begin(self, index: int, direction: BackwardDirection, arriving: Arriving) -> Decision:
        """Decide for one backward of direction `index`; see `contract.Control`."""
        threshold, target = self.options.threshold, self.options.target
        for name in (*_TENSORS, "scale"):
            setattr(self, name, getattr(self, name).to(arriving.y.device))
        loss_scale = 1.0 if threshold is None else self._loss_scale()
        seed = self._count_step(index)
        if not self.options.is_sparse(self.begun[index] - 1):
            return Decision(self.rule, None, seed)
        if threshold is not None:
            thresholds = self._filled_thresholds(float(threshold), loss_scale)
            return Decision(self.rule, thresholds, seed, self.likely_zeros[index])
        assert target is not None
        self.scale[index] = arriving_scale(arriving)
        if not self.calibrated[index]:
            return Decision(self.rule, None, seed, keep_gates=True)
        return Decision(self.rule, self._thresholds(index), seed, float(target))

    @torch.no_grad()
    def finish(
        self, index: int, direction: BackwardDirection, needed: Needed, decision: Decision, gradients: Gradients
    ) -> None:
        """Count what became zero and move thresholds; see `contract.Control`."""
        zeros, target = gradients.zeros, self.options.target
        self._count(index, direction, needed, zeros)
        if decision.keep_gates:
            self._calibrate(index, direction, gradients)
        elif decision.thresholds is not None and target is not None:
            self._move_thresholds(index, zeros, float(target))
        elif decision.thresholds is not None and zeros.device.type == "cpu":  # elsewhere reading it would wait
            gate_gradients = len(self.gates) * int(self.last[index, len(self.gates)])
            self.likely_zeros[index] = float(zeros.sum()) / max(1, gate_gradients)

    def stats(self) -> GateGradientStats | None:
        """Read the counts, which may wait for the device; None before the first backward."""
        steps = int(self.steps.max())
        if steps == 0:
            return None
        last, total = self.last.tolist(), self.total.tolist()
        return GateGradientStats(
            steps=steps,
            zeros=self._zeros(last),
            mean_zeros=self._zeros(total),
            redundant_macs=_redundant_share(last),
            mean_redundant_macs=_redundant_share(total),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return thresholds, counts and the numbers behind the random ones: tensors and plain values, all copies.

        Training that goes on from it with the same options, on the same machine, is the same to the bit.

        >>> from triton_sparse_rnn import SparseGRU
        >>> layer = SparseGRU(4, 8, gate_gradient=GateGradientSparsity(target=0.5))
        >>> checkpoint = {"layer": layer.state_dict(), "zeros": layer.gate_gradient_controller.state_dict()}
        >>> layer.gate_gradient_controller.load_state_dict(checkpoint["zeros"])
        """
        tensors = {name: getattr(self, name).clone() for name in _TENSORS}
        lists = {"calibrated": list(self.calibrated), "likely_zeros": list(self.likely_zeros)}
        layer = {"gates": self.gates, "directions": list(self.names), "hidden_size": self.hidden_size}
        return {"version": VERSION, "layer": layer, "stream": self.stream, **lists, **tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict()`, on the device of this one. Options are not in it, and may be others.

        Raises:
            TypeError, ValueError: `state` does not fit the layer or the structure, or is damaged. Nothing is loaded.
        """
        self._check(state)
        for name in _TENSORS:
            getattr(self, name).copy_(state[name])
        self.begun = state["steps"].tolist()
        self.calibrated = list(state["calibrated"])
        self.likely_zeros = list(state["likely_zeros"])
        self.stream = state["stream"]

    def _loss_scale(self) -> float | Tensor:
        given = self.options.loss_scale
        scale = given() if callable(given) else given
        if not isinstance(scale, Tensor):
            check_positive("loss_scale()", scale)
            return float(scale)
        if scale.numel() != 1:
            raise ValueError(f"loss_scale() must be one number, got a tensor {list(scale.shape)}")
        return scale

    def _count_step(self, index: int) -> Tensor:
        """Count a backward that begins; returns its random seed, [1]."""
        self.steps[index] += 1
        self.begun[index] += 1
        return hash32((self.steps[index : index + 1] & LOW_BITS) ^ mix(int(self.options.seed), self.stream, index))

    def _filled_thresholds(self, threshold: float, loss_scale: float | Tensor) -> Tensor:
        """Return thresholds, [Q], all threshold * loss_scale; 0 if a scale in a tensor is not finite and above 0."""
        shape = self.log_thresholds.shape[1:]
        if isinstance(loss_scale, Tensor):
            scale = loss_scale.detach().to(self.steps.device, torch.float32).reshape(1)
            return torch.where(_is_usable(scale), threshold * scale, 0).expand(shape).contiguous()
        return self.log_thresholds.new_full(shape, min(threshold * loss_scale, LARGEST))

    def _thresholds(self, index: int) -> Tensor:
        """Return those of a target, [Q], for the gradients that arrived; 0 where these are not finite."""
        scale = self.scale[index]
        return torch.where(_is_usable(scale), self.log_thresholds[index].exp() * scale, 0)

    def _count(self, index: int, direction: BackwardDirection, needed: Needed, zeros: Tensor) -> None:
        """Count the zeros of a backward, [G], and what they are worth."""
        G, last = len(self.gates), self.last[index]
        last[:G] = zeros
        last[G].fill_(direction.x.shape[0] * self.hidden_size)
        torch.mul(zeros.sum(), macs_per_gate_gradient(direction, needed), out=last[G + 1])
        last[G + 2].fill_(macs_of_training(direction, needed))
        self.total[index] += last

    def _calibrate(self, index: int, direction: BackwardDirection, gradients: Gradients) -> None:
        """Set the thresholds of a target by the gate gradients of a dense backward."""
        assert gradients.gates is not None
        assert self.options.target is not None
        scale, own = self.scale[index], self.log_thresholds[index]
        target = float(self.options.target)
        fitting = fitting_log_thresholds(gradients.gates, direction.steps, self.rule, scale, target)
        own.copy_(torch.where(_is_usable(scale), fitting, own))
        self.calibrated[index] = bool(_is_usable(scale))  # waits for the device; a GradScaler may overflow

    def _move_thresholds(self, index: int, zeros: Tensor, target: float) -> None:
        """Move the thresholds of a target by what they led to; `_count` comes before."""
        own = self.log_thresholds[index]
        shares = zeros.float() / self.last[index, len(self.gates)]
        missing = target - (shares if own.numel() > 1 else shares.mean())
        own += torch.where(_is_usable(self.scale[index]), float(self.options.gain) * missing, 0)
        own.clamp_(LOWEST, HIGHEST)

    def _zeros(self, counts: list[list[int]]) -> ZerosOfGates:
        G = len(self.gates)
        return {
            name: {gate: row[g] / row[G] for g, gate in enumerate(self.gates)}
            for name, row in zip(self.names, counts, strict=True)
            if row[G]  # this direction had a backward
        }

    def _check(self, state: Mapping[str, Any]) -> None:
        if not isinstance(state, Mapping):
            raise TypeError(f"state_dict must be a mapping, got {type(state).__name__}")
        if state.get("version", VERSION) != VERSION:
            raise ValueError(f"state_dict has version {state['version']!r}, this package reads {VERSION}")
        own, K = self.state_dict(), len(self.names)
        if set(state) != set(own):
            missing = ", ".join(sorted(set(own) - set(state))) or "none"
            unexpected = ", ".join(sorted(map(str, set(state) - set(own)))) or "none"
            raise ValueError(f"state_dict is not of a gate_gradient: missing {missing}; unexpected {unexpected}")
        if state["layer"] != own["layer"]:
            raise ValueError(f"state_dict is of a layer with {state['layer']}, but this layer has {own['layer']}")
        for name in _TENSORS:
            _check_saved_tensor(name, state[name], own[name])
        wanted = {
            "stream": ("an integer from 0", lambda value: type(value) is int and value >= 0),
            "calibrated": (f"a list of {K} bools", lambda value: _is_list(value, K, bool)),
            "likely_zeros": (
                f"a list of {K} floats from 0 to 1",
                lambda value: _is_list(value, K, float) and all(0 <= share <= 1 for share in value),
            ),
        }
        for name, (what, fits) in wanted.items():
            if not fits(state[name]):
                raise ValueError(f"state_dict[{name!r}] must be {what}, got {state[name]!r}")


def rule_of(options: GateGradientSparsity) -> Rule:
    """Return what becomes zero in a sparse step."""
    rule = options.rule or ("deterministic" if options.structure == "elements" else "stochastic")
    selection = "small" if rule == "deterministic" else "sample"
    return Rule(selection, options.structure, int(options.units), int(options.rows))


def _number_of_layer(options: GateGradientSparsity) -> int:
    """Count the layers that these very options were given to; equal ones that are made anew begin at 1 again."""
    key = id(options)
    if key not in _layers_given:
        _layers_given[key] = itertools.count(1)
        weakref.finalize(options, _layers_given.pop, key)
    return next(_layers_given[key])


def _is_usable(scale: Tensor) -> Tensor:
    return scale.isfinite() & (scale > 0)


def _redundant_share(counts: list[list[int]]) -> float:
    return sum(row[-2] for row in counts) / max(sum(row[-1] for row in counts), 1)


def _check_saved_tensor(name: str, found: object, own: Tensor) -> None:
    if not isinstance(found, Tensor) or found.shape != own.shape or found.dtype != own.dtype:
        got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ValueError(
            f"state_dict[{name!r}] must be {own.dtype} {list(own.shape)}, got {got}; a state fits the same kind of "
            "layer with the same structure of groups"
        )
    if not torch.isfinite(found).all() or (found.dtype == torch.int64 and (found < 0).any()):
        raise ValueError(f"state_dict[{name!r}] is damaged: it holds negative or non-finite numbers")


def _is_list(value: object, length: int, kind: type) -> bool:
    return isinstance(value, list) and len(value) == length and all(type(item) is kind for item in value)
