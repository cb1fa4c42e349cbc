"""What the GateGradientSparsity of one layer remembers: thresholds, counters and counts, as tensors on its device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import RNNBase

from triton_sparse_rnn.gate_gradients.contract import Direction, Needed, Rule, Steps
from triton_sparse_rnn.gate_gradients.random import hash32
from triton_sparse_rnn.gate_gradients.stats import (
    GateGradientStats,
    ZerosOfGates,
    macs_of_training,
    macs_per_gate_gradient,
)
from triton_sparse_rnn.gate_gradients.thresholds import HIGHEST, LOWEST, fitting_log_thresholds
from triton_sparse_rnn.sparse.block_matrix import GATE_NAMES

START = -3.0  # of log_thresholds, until they are calibrated
VERSION = 1
_BITS = 0xFFFFFFFF
_LARGEST = torch.finfo(torch.float32).max
_TENSORS = ("steps", "log_thresholds", "last", "total")


class GateGradientState:
    """The state of a layer with K directions (of all its layers) and G gates; row k of a tensor is direction k.

    The host reads these tensors once in training, after it set the thresholds by a first backward; what else it must
    know to go on, it counts itself.

    Attributes:
        steps: [K], int64, backward passes begun. Random numbers depend on it.
        log_thresholds: [K, Q], float32, of the controller; Q thresholds in a direction.
        last: [K, G + 3], int64, of the last backward: zeros of each gate, gate gradients per gate, redundant and all
            multiply-accumulates.
        total: [K, G + 3], float64, the sum over all backward passes.
        scale: [K], float32, size of the gradients that arrived last; not saved.
        calibrated: [K], whether a first backward has set the thresholds.
        likely_zeros: [K], share of zeros to expect.
        stream: the number that makes the random numbers of two layers differ.
    """

    @torch.inference_mode(False)  # its tensors change in training
    def __init__(self, layer: RNNBase, *, per_gate: bool, stream: int) -> None:
        suffixes = ("", "_reverse") if layer.bidirectional else ("",)
        self.gates = GATE_NAMES[layer.mode]
        self.names = [f"l{k}{suffix}" for k in range(layer.num_layers) for suffix in suffixes]
        self.hidden_size = layer.hidden_size
        K, G = len(self.names), len(self.gates)
        self.steps = torch.zeros(K, dtype=torch.int64, device="cpu")
        self.log_thresholds = torch.full((K, G if per_gate else 1), START, dtype=torch.float32, device="cpu")
        self.last = torch.zeros(K, G + 3, dtype=torch.int64, device="cpu")
        self.total = torch.zeros(K, G + 3, dtype=torch.float64, device="cpu")
        self.scale = torch.zeros(K, dtype=torch.float32, device="cpu")
        self.begun = [0] * K  # `steps`, as the host counts
        self.calibrated = [False] * K
        self.likely_zeros = [0.0] * K
        self.stream = stream

    def move(self, device: torch.device) -> None:
        if self.steps.device != device:
            for name in (*_TENSORS, "scale"):
                setattr(self, name, getattr(self, name).to(device))

    def count_step(self, index: int) -> int:
        """Count a backward of direction `index` and return how many there were before."""
        self.steps[index] += 1
        self.begun[index] += 1
        return self.begun[index] - 1

    def random_seed(self, index: int, seed: int) -> Tensor:
        """Return the [1] seed of this backward, which depends on what is given, the stream and the step."""
        key = mix(seed, self.stream, index)
        return hash32(self.steps[index : index + 1].bitwise_and(_BITS) ^ key)

    def count(self, index: int, direction: Direction, needed: Needed, zeros: Tensor) -> None:
        """Count the zeros of a backward, [G], and what they are worth."""
        G, last = len(self.gates), self.last[index]
        last[:G] = zeros
        last[G].fill_(direction.x.shape[0] * self.hidden_size)
        torch.mul(zeros.sum(), macs_per_gate_gradient(direction, needed), out=last[G + 1])
        last[G + 2].fill_(macs_of_training(direction, needed))
        self.total[index] += last

    def filled_thresholds(self, threshold: float, loss_scale: float | Tensor) -> Tensor:
        """Return thresholds, [Q], all threshold * loss_scale; 0 if a scale in a tensor is not finite and above 0."""
        shape = self.log_thresholds.shape[1:]
        if isinstance(loss_scale, Tensor):
            scale = loss_scale.detach().to(self.steps.device, torch.float32).reshape(1)
            return torch.where(_is_usable(scale), threshold * scale, 0).expand(shape).contiguous()
        return self.log_thresholds.new_full(shape, min(threshold * loss_scale, _LARGEST))

    def thresholds(self, index: int) -> Tensor:
        """Return the controller's thresholds, [Q], for the gradients that arrived; 0 where these are not finite."""
        scale = self.scale[index]
        return torch.where(_is_usable(scale), self.log_thresholds[index].exp() * scale, 0)

    def calibrate(self, index: int, gates: Tensor, steps: Steps, rule: Rule, target: float) -> None:
        """Set the controller's thresholds by the gate gradients of a dense backward, [N, G, H]."""
        fitting = fitting_log_thresholds(gates, steps, rule, self.scale[index], target)
        own = self.log_thresholds[index]
        own.copy_(torch.where(_is_usable(self.scale[index]), fitting, own))
        self.calibrated[index] = bool(_is_usable(self.scale[index]))  # waits for the device; a GradScaler may overflow

    def move_thresholds(self, index: int, zeros: Tensor, target: float, gain: float) -> None:
        """Move the controller's thresholds by what they led to; zeros as in `count`, which comes before."""
        own = self.log_thresholds[index]
        shares = zeros.float() / self.last[index, len(self.gates)]
        missing = target - (shares if own.numel() > 1 else shares.mean())
        own += torch.where(_is_usable(self.scale[index]), gain * missing, 0)
        own.clamp_(LOWEST, HIGHEST)

    def expect_zeros(self, index: int, zeros: Tensor) -> None:
        """Remember the share of zeros of a sparse backward."""
        self.likely_zeros[index] = float(zeros.sum()) / max(1, len(self.gates) * int(self.last[index, len(self.gates)]))

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

    def _zeros(self, counts: list[list[int]]) -> ZerosOfGates:
        G = len(self.gates)
        return {
            name: {gate: row[g] / row[G] for g, gate in enumerate(self.gates)}
            for name, row in zip(self.names, counts, strict=True)
            if row[G]  # this direction had a backward
        }

    def state_dict(self) -> dict[str, Any]:
        """Return copies as tensors, numbers and lists of them."""
        tensors = {name: getattr(self, name).clone() for name in _TENSORS}
        lists = {"calibrated": list(self.calibrated), "likely_zeros": list(self.likely_zeros)}
        return {"version": VERSION, "layer": self._layer(), "stream": self.stream, **lists, **tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state_dict, or raise and stay as it is; see `GateGradientSparsity.load_state_dict`."""
        self._check(state)
        for name in _TENSORS:
            getattr(self, name).copy_(state[name])
        self.begun = state["steps"].tolist()
        self.calibrated = list(state["calibrated"])
        self.likely_zeros = list(state["likely_zeros"])
        self.stream = state["stream"]

    def _layer(self) -> dict[str, Any]:
        return {"gates": self.gates, "directions": list(self.names), "hidden_size": self.hidden_size}

    def _check(self, state: Mapping[str, Any]) -> None:
        if not isinstance(state, Mapping):
            raise TypeError(f"state_dict must be a mapping, got {type(state).__name__}")
        if state.get("version", VERSION) != VERSION:
            raise ValueError(f"state_dict has version {state['version']!r}, this package reads {VERSION}")
        own = self.state_dict()
        if set(state) != set(own):
            missing = ", ".join(sorted(set(own) - set(state))) or "none"
            unexpected = ", ".join(sorted(map(str, set(state) - set(own)))) or "none"
            raise ValueError(f"state_dict is not of a gate_gradient: missing {missing}; unexpected {unexpected}")
        if state["layer"] != own["layer"]:
            raise ValueError(f"state_dict is of a layer with {state['layer']}, but this layer has {own['layer']}")
        if not _is_count(state["stream"]):
            raise ValueError(f"state_dict['stream'] must be an integer from 0, got {state['stream']!r}")
        for name in _TENSORS:
            _check_tensor(name, state[name], own[name])
        K = len(self.names)
        if not (_is_list(state["calibrated"], K) and all(type(flag) is bool for flag in state["calibrated"])):
            raise ValueError(f"state_dict['calibrated'] must be a list of {K} bools, got {state['calibrated']!r}")
        shares = state["likely_zeros"]
        if not (_is_list(shares, K) and all(type(share) is float and 0 <= share <= 1 for share in shares)):
            raise ValueError(f"state_dict['likely_zeros'] must be a list of {K} floats from 0 to 1, got {shares!r}")


def mix(*numbers: int) -> int:
    """Hash integers from 0 to one of 32 bits.

    >>> mix(0, 1) != mix(1, 0)
    True
    """
    key = 0
    for number in numbers:
        key = (hash32((key ^ number) & _BITS) + 0x9E3779B9) & _BITS
    return key


def _is_usable(scale: Tensor) -> Tensor:
    return scale.isfinite() & (scale > 0)


def _redundant_share(counts: list[list[int]]) -> float:
    return sum(row[-2] for row in counts) / max(sum(row[-1] for row in counts), 1)


def _check_tensor(name: str, found: object, own: Tensor) -> None:
    if not isinstance(found, Tensor) or found.shape != own.shape or found.dtype != own.dtype:
        got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ValueError(
            f"state_dict[{name!r}] must be {own.dtype} {list(own.shape)}, got {got}; a state fits the same kind of "
            "layer with the same structure of groups"
        )
    if not torch.isfinite(found).all() or (found.dtype == torch.int64 and (found < 0).any()):
        raise ValueError(f"state_dict[{name!r}] is damaged: it holds negative or non-finite numbers")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_list(value: object, length: int) -> bool:
    return isinstance(value, list) and len(value) == length
