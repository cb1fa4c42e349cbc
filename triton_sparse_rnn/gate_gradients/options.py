"""Training with small gate gradients set to zero: what is zeroed, how thresholds are held, and when."""

from __future__ import annotations

import copy
import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn, TypeGuard

import torch
from torch import Tensor
from torch.nn import RNNBase

from triton_sparse_rnn.gate_gradients.contract import Arriving, Choice, Direction, Gradients, Needed, Rule
from triton_sparse_rnn.gate_gradients.controller import GateGradientState, mix
from triton_sparse_rnn.gate_gradients.stats import GateGradientStats
from triton_sparse_rnn.gate_gradients.thresholds import arriving_scale
from triton_sparse_rnn.ops.dispatch import check_backend

_SELECTIONS: dict[str, Literal["small", "sample", "top"]] = {
    "deterministic": "small",
    "stochastic": "sample",
    "top": "top",
}
_STRUCTURES = ("elements", "blocks", "rows")
_LARGEST = torch.finfo(torch.float32).max
_LARGEST_SIZE = (1 << 31) - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateGradientSparsity:
    """Make small gradients of the gates exactly zero while a SparseLSTM or SparseGRU trains.

    In backward, at every time step, the gradients of the linear gates (of what goes into sigmoid and tanh) that are
    small become zero before they are used for the step before, for the input and for the weights (Zhu, Rhu, Clemons,
    Keckler, Xie 2017; in blocks: Zhu, Clemons, Pool, Rhu, Keckler, Xie 2018). Forward, results in eval() and under
    no_grad() stay torch.nn's.

    >>> from triton_sparse_rnn import GateGradientSparsity, SparseLSTM
    >>> layer = SparseLSTM(4, 8, gate_gradient=GateGradientSparsity(target=0.8))
    >>> for _ in range(3):  # the training loop stays as it was
    ...     y, (h, c) = layer(torch.randn(10, 16, 4))
    ...     y.square().mean().backward()
    >>> layer.gate_gradient_stats.steps
    3
    >>> all(0.6 < share < 0.95 for share in layer.gate_gradient_stats.zeros["l0"].values())
    True
    >>> layer.gate_gradient = None  # nn.LSTM again

    **Target or threshold.** `target=0.8` is the share of zeros to hold. A controller holds it for every gate by
    itself (the gradients of g are several times those of i, f and o). Its thresholds are a multiple of the root mean
    square of the gradients that arrive at the layer, fixed before time is gone through, so it needs no sorting and no
    waiting for a GPU, and scaling the loss changes nothing. The first backward that is not to be dense is dense all the
    same and sets the multiples (again, where its gradients are not finite; only these wait for a GPU); after every
    further one their logarithms move by gain * (target - measured share).

    `threshold` is absolute, in the gradient of *one summed loss*: a gate gradient g of the loss you call backward on
    becomes zero if |g| / loss_scale < threshold. A mean divides all gradients by the number of its terms, so with
    the mean over n terms give loss_scale=1 / n, or the threshold means something else whenever batch or length change.
    A GradScaler multiplies them: give loss_scale=scaler.get_scale, which is called in every backward (and waits for a
    GPU; a function that returns a tensor need not). The share of zeros follows the gradients as a model learns.

    **Rules.** "deterministic": all that is below the threshold becomes zero. "stochastic": a gradient v below the
    threshold t is kept with probability |v| / t, as sign(v) t, else becomes zero (a group is kept times t / v). It is
    "unbiased": the expected gradient of every weight is the one of dense training, at the price of noise. On two tasks
    of ours the deterministic rule did as well or better in elements, up to 90 % zeros; in blocks it is the other way
    round. "top": keep the largest, a sort at every step; slow, plain torch, for comparison. None takes "deterministic"
    for elements and "stochastic" for blocks and rows.

    **Structures.** "elements" gives the most zeros for the least accuracy, and on a CPU backward skips them. "blocks"
    of `units` hidden units, all gates, in `rows` consecutive rows of the batch suit a GPU, "rows" (a row of the batch
    at a time step) any machine: whole products fall away. A group is as large as the root mean square of its gradients.

    **Costs.** Backward computes gates and cell states once more, or reads those that oneDNN left, and holds what it
    holds in torch.nn. Where zeros are few it multiplies densely. `layer.gate_gradient_stats` tells how many zeros
    there were, and which share of the multiply-accumulates of training they make redundant.

    **State.** What you pass is a template: every layer makes its own copy, `layer.gate_gradient`, that keeps
    thresholds, counts and random numbers for all its layers and directions, on the layer's device. None of it is in the
    layer's state_dict, which stays torch.nn's; save `layer.gate_gradient.state_dict()` beside it, for a model

        layers = {name: layer for name, layer in model.named_modules() if getattr(layer, "gate_gradient", None)}
        states = {name: layer.gate_gradient.state_dict() for name, layer in layers.items()}
        ...
        for name, layer in layers.items():
            layer.gate_gradient.load_state_dict(states[name])

    To set `gate_gradient` again, `sparsify(model, gate_gradient=...)` a second time too, begins with a new state. Each
    rank of DistributedDataParallel has its own; give ranks different seeds if their random numbers should differ. A
    module that was pickled whole holds a copy of what `loss_scale` is bound to, such as a GradScaler: set it again.

    **Limits.** No second derivatives, no forward mode, no vmap, no nn.DataParallel: RuntimeError. What a layer returns
    must not be written to before backward, which torch says then; of float64, GRU and packed layers torch.nn allows it.

    Args:
        threshold: size below which a gate gradient is zeroed, from 0. Give this or `target`.
        target: share of zeros of every gate (of all together in blocks, rows and with "top"), in [0, 1). At 0.8 nothing
            was lost on two tasks of ours (studies/results/lstm-training.md), as in the paper.
        rule: "deterministic", "stochastic", "top" (needs `target`), or None.
        structure: "elements", "blocks" or "rows".
        units, rows: size of a block in hidden units (at most hidden_size) and rows of the batch; the last of each may
            be smaller.
        begin_step, end_step: backward passes through the layer, counted from 0, are sparse from begin_step on and
            before end_step; None: to the end. With `target`, the one at begin_step sets thresholds. Dense steps at the
            end of training win accuracy back.
        dense_every: every n-th backward is dense, n from 2: steps n - 1, 2 n - 1 and so on. Mixing dense steps in
            makes up for what structures cost (Zhu et al. 2018).
        loss_scale: by what the loss was multiplied, above 0, or a function that returns it as a float or a tensor of
            one number. For `threshold`; `target` needs none.
        gain: of the controller, above 0. Up to 2 it cannot swing: when the logarithm of a threshold rises by d, the
            share of zeros rises by d at most, except with the deterministic rule where groups are almost of one size.
        seed: of the stochastic rule, from 0 to 2^32 - 1. torch's random numbers are not used. Each layer that gets a
            copy of one template draws other numbers, so for a second run that is to be the same make a new one.
        backend: "triton", "cpu" or "reference", or None for the fastest that fits.

    Raises:
        TypeError, ValueError: an argument, or two together, are not as said.
    """

    threshold: float | None = None
    target: float | None = None
    rule: Literal["deterministic", "stochastic", "top"] | None = None
    structure: Literal["elements", "blocks", "rows"] = "elements"
    units: int = 16
    rows: int = 16
    begin_step: int = 0
    end_step: int | None = None
    dense_every: int | None = None
    loss_scale: float | Callable[[], float | Tensor] = 1.0
    gain: float = 1.0
    seed: int = 0
    backend: str | None = None
    _state: GateGradientState | None = dataclasses.field(default=None, init=False, repr=False, compare=False)
    _copies: int = dataclasses.field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.target is None):
            raise ValueError(f"give threshold or target, not both, got {self.threshold!r} and {self.target!r}")
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            check(name, value)
            if _is_real(value):  # of numpy, a Fraction
                object.__setattr__(self, name, int(value) if _is_integer(value) else float(value))
        check_backend(self.backend)
        if self.rule == "top" and self.target is None:
            raise ValueError("rule 'top' needs target, the share of zeros; it knows no threshold")
        if self.end_step is not None and self.end_step <= self.begin_step:
            raise ValueError(f"end_step must be above begin_step={self.begin_step}, got {self.end_step}")

    def __repr__(self) -> str:
        fields = [field for field in dataclasses.fields(self) if field.init]
        given = [field.name for field in fields if getattr(self, field.name) != field.default]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in given)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> GateGradientSparsity:
        """Copy the state and share `loss_scale`: a copied GradScaler would not be the one that scales the loss."""
        copied = copy.copy(self)
        object.__setattr__(copied, "_state", copy.deepcopy(self._state, memo))
        return copied

    def check_layer(self, layer: RNNBase) -> None:
        """Raise ValueError if a layer has fewer hidden units than a block."""
        if self.structure == "blocks" and self.units > layer.hidden_size:
            raise ValueError(f"units must be at most the layer's hidden_size={layer.hidden_size}, got {self.units}")

    def copy_for(self, layer: RNNBase) -> GateGradientSparsity:
        """Return a copy with a state of its own for `layer`, an LSTM or GRU: `layer.gate_gradient = self` does it.

        Copies of one template are numbered as they are made, and draw different random numbers. The number is a part of
        the state, so that what a loaded state draws does not depend on the order.

        Raises:
            ValueError: blocks of more units than the layer has.
        """
        self.check_layer(layer)
        object.__setattr__(self, "_copies", self._copies + 1)
        parent = 0 if self._state is None else self._state.stream
        copied = dataclasses.replace(self)
        state = GateGradientState(layer, per_gate=self.structure == "elements", stream=mix(parent, self._copies))
        object.__setattr__(copied, "_state", state)
        return copied

    def state_dict(self) -> dict[str, Any]:
        """Return thresholds, counts and the numbers behind the random ones: tensors and plain values, all copies.

        Training that goes on from it with the same arguments, on the same machine, is the same to the bit.

        >>> from triton_sparse_rnn import SparseGRU
        >>> layer = SparseGRU(4, 8, gate_gradient=GateGradientSparsity(target=0.5))
        >>> checkpoint = {"layer": layer.state_dict(), "gate_gradient": layer.gate_gradient.state_dict()}
        >>> layer.gate_gradient.load_state_dict(checkpoint["gate_gradient"])

        Raises:
            RuntimeError: this is a template; its copies, `layer.gate_gradient`, have a state.
        """
        return self._layer_state().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict()`, on the device of this one. Arguments are not in it, and may be others.

        Raises:
            RuntimeError: this is a template.
            TypeError, ValueError: `state` does not fit the layer or the structure, or is damaged. Nothing is loaded.
        """
        self._layer_state().load_state_dict(state)

    @property
    def stats(self) -> GateGradientStats | None:
        """What was zeroed so far; None before the first backward. It waits for the device."""
        return self._layer_state().stats()

    @torch.no_grad()
    def begin(self, index: int, direction: Direction, arriving: Arriving) -> Choice:
        """Choose for one backward of direction `index`; function.py calls it, see `contract.Control`."""
        state = self._layer_state()
        state.move(arriving.y.device)
        loss_scale = 1.0 if self.threshold is None else self._loss_scale()
        is_sparse = self._is_sparse(state.count_step(index))
        seed = state.random_seed(index, self.seed)
        if not is_sparse:
            return self._dense_choice(seed)
        if self.threshold is not None:
            thresholds = state.filled_thresholds(self.threshold, loss_scale)
            return Choice(self.sparse_rule, thresholds, seed, state.likely_zeros[index], keep_gates=False)
        assert self.target is not None
        if self.rule == "top":
            return Choice(self.sparse_rule, None, seed, self.target, keep_gates=False)
        state.scale[index] = arriving_scale(arriving)
        if not state.calibrated[index]:
            return self._dense_choice(seed, keep_gates=True)
        return Choice(self.sparse_rule, state.thresholds(index), seed, self.target, keep_gates=False)

    @torch.no_grad()
    def finish(self, index: int, direction: Direction, needed: Needed, choice: Choice, gradients: Gradients) -> None:
        """Count what became zero and move thresholds; function.py calls it, see `contract.Control`."""
        state = self._layer_state()
        state.count(index, direction, needed, gradients.zeros)
        if choice.keep_gates:
            assert gradients.gates is not None
            assert self.target is not None
            state.calibrate(index, gradients.gates, direction.steps, self.sparse_rule, self.target)
        elif choice.thresholds is not None and self.target is not None:
            state.move_thresholds(index, gradients.zeros, self.target, self.gain)
        elif choice.thresholds is not None and gradients.zeros.device.type == "cpu":  # elsewhere reading it would wait
            state.expect_zeros(index, gradients.zeros)

    @property
    def sparse_rule(self) -> Rule:
        """What becomes zero in a sparse step."""
        rule = self.rule or ("deterministic" if self.structure == "elements" else "stochastic")
        keep = 1.0 if self.target is None else 1.0 - self.target
        return Rule(_SELECTIONS[rule], self.structure, self.units, self.rows, keep)

    def _dense_choice(self, seed: Tensor, *, keep_gates: bool = False) -> Choice:
        rule = dataclasses.replace(self.sparse_rule, selection="small")  # for "top" knows no threshold
        return Choice(rule, None, seed, likely_zeros=0.0, keep_gates=keep_gates)

    def _is_sparse(self, step: int) -> bool:
        if step < self.begin_step or (self.end_step is not None and step >= self.end_step):
            return False
        return self.dense_every is None or (step + 1) % self.dense_every != 0

    def _loss_scale(self) -> float | Tensor:
        scale = self.loss_scale() if callable(self.loss_scale) else self.loss_scale
        if not isinstance(scale, Tensor):
            _check_positive("loss_scale()", scale)
        elif scale.numel() != 1:
            raise ValueError(f"loss_scale() must be one number, got a tensor {list(scale.shape)}")
        return scale

    def _layer_state(self) -> GateGradientState:
        if self._state is None:
            raise RuntimeError(
                "this GateGradientSparsity is a template and has no state: set it as a layer's gate_gradient, and use "
                "the copy that layer.gate_gradient then is"
            )
        return self._state


def _check_threshold(name: str, value: object) -> None:
    if value is not None and not (_is_real(value) and 0 <= value <= _LARGEST):
        _refuse(name, "a number from 0 that float32 holds", value)


def _check_target(name: str, value: object) -> None:
    if value is not None and not (_is_real(value) and 0 <= value < 1):
        _refuse(name, "a number in [0, 1)", value)


def _check_positive(name: str, value: object) -> None:
    if not (_is_real(value) and 0 < value < math.inf):
        _refuse(name, "a finite number above 0", value)


def _check_loss_scale(name: str, value: object) -> None:
    if not callable(value):
        _check_positive(name, value)


def _integer_from(lowest: int, highest: int | None = None, *, or_none: bool = False) -> Callable[[str, object], None]:
    def check(name: str, value: object) -> None:
        fits = _is_integer(value) and lowest <= value and (highest is None or value <= highest)
        if not (fits or (or_none and value is None)):
            end = "" if highest is None else f" to {highest}"
            _refuse(name, f"{'None or ' if or_none else ''}an integer from {lowest}{end}", value)

    return check


def _one_of(*choices: str | None) -> Callable[[str, object], None]:
    def check(name: str, value: object) -> None:
        if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")

    return check


def _check_seed(name: str, value: object) -> None:
    if not (_is_integer(value) and 0 <= value < 1 << 32):
        _refuse(name, "an integer from 0 to 2^32 - 1", value)


_CHECKS: dict[str, Callable[[str, object], None]] = {
    "threshold": _check_threshold,
    "target": _check_target,
    "rule": _one_of(None, *_SELECTIONS),
    "structure": _one_of(*_STRUCTURES),
    "units": _integer_from(1, _LARGEST_SIZE),
    "rows": _integer_from(1, _LARGEST_SIZE),
    "begin_step": _integer_from(0),
    "end_step": _integer_from(0, or_none=True),
    "dense_every": _integer_from(2, or_none=True),
    "loss_scale": _check_loss_scale,
    "gain": _check_positive,
    "seed": _check_seed,
}


def _is_real(value: object) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _refuse(name: str, wanted: str, value: object) -> NoReturn:
    kind = ValueError if isinstance(value, numbers.Number) and not isinstance(value, bool) else TypeError
    raise kind(f"{name} must be {wanted}, got {value!r}")
