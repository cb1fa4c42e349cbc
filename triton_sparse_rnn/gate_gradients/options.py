"""Training with small gate gradients set to zero: what is zeroed, by which thresholds, and when."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import RNNBase

from triton_sparse_rnn.ops.dispatch import check_backend

LARGEST = torch.finfo(torch.float32).max  # threshold


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
    round. None takes "deterministic" for elements and "stochastic" for blocks.

    **Structures.** "elements" gives the most zeros for the least accuracy, and on a CPU backward skips them. "blocks"
    of `units` hidden units, all gates, in `rows` consecutive rows of the batch suit a GPU: whole products fall away. A
    block is as large as the root mean square of its gradients.

    **Costs.** Backward computes gates and cell states once more, or reads those that oneDNN left, and holds what it
    holds in torch.nn. Where zeros are few it multiplies densely. `layer.gate_gradient_stats` tells how many zeros
    there were, and which share of the multiply-accumulates of training they make redundant.

    **State.** These are options, and stay what they are; layers may share them. Thresholds, counts and random numbers
    of a layer are in its `layer.gate_gradient_controller`, on the layer's device. None of it is in the layer's
    state_dict, which stays torch.nn's; save the controller's beside it, for a model

        modules = model.named_modules()
        layers = {name: layer for name, layer in modules if getattr(layer, "gate_gradient", None)}
        states = {name: layer.gate_gradient_controller.state_dict() for name, layer in layers.items()}
        ...
        for name, layer in layers.items():
            layer.gate_gradient_controller.load_state_dict(states[name])

    To set `gate_gradient` again, `sparsify(model, gate_gradient=...)` a second time too, begins with a new state. Each
    rank of DistributedDataParallel has its own; give ranks different seeds if their random numbers should differ. A
    module that was pickled whole holds a copy of what `loss_scale` is bound to, such as a GradScaler: set it again.

    **Limits.** No second derivatives, no forward mode, no vmap, no nn.DataParallel: RuntimeError. What a layer returns
    must not be written to before backward, which torch says then; of float64, GRU and packed layers torch.nn allows it.

    Args:
        threshold: size below which a gate gradient is zeroed, from 0. Give this or `target`.
        target: share of zeros of every gate (of all together in blocks), in [0, 1). At 0.8 nothing was lost on two
            tasks of ours (studies/results/lstm-training.md), as in the paper.
        rule: "deterministic", "stochastic", or None.
        structure: "elements" or "blocks".
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
        seed: of the stochastic rule, from 0 to 2^32 - 1. torch's random numbers are not used. Each layer that these
            options are given to draws other numbers, so for a second run that is to be the same make them anew.
        backend: "triton", "cpu" or "reference", or None for the fastest that fits.

    Raises:
        TypeError, ValueError: an argument, or two together, are not as said.
    """

    threshold: float | None = None
    target: float | None = None
    rule: Literal["deterministic", "stochastic"] | None = None
    structure: Literal["elements", "blocks"] = "elements"
    units: int = 16
    rows: int = 16
    begin_step: int = 0
    end_step: int | None = None
    dense_every: int | None = None
    loss_scale: float | Callable[[], float | Tensor] = 1.0
    gain: float = 1.0
    seed: int = 0
    backend: str | None = None

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.target is None):
            raise ValueError(f"give threshold or target, not both, got {self.threshold!r} and {self.target!r}")
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        for name, (fits, wanted) in _NUMBERS.items():
            _check_number(name, getattr(self, name), fits, wanted)
        if not callable(self.loss_scale):
            check_positive("loss_scale", self.loss_scale)
        check_backend(self.backend)
        if self.end_step is not None and self.end_step <= self.begin_step:
            raise ValueError(f"end_step must be above begin_step={self.begin_step}, got {self.end_step}")

    def __repr__(self) -> str:
        given = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in given)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> GateGradientSparsity:
        """Nothing in it changes, and a copy of the GradScaler behind `loss_scale` would not scale the loss."""
        return self

    def is_sparse(self, step: int) -> bool:
        """Whether a backward is sparse, counted from 0."""
        if step < self.begin_step or (self.end_step is not None and step >= self.end_step):
            return False
        return self.dense_every is None or (step + 1) % self.dense_every != 0

    def check_layer(self, layer: RNNBase) -> None:
        """Raise ValueError if a layer has fewer hidden units than a block."""
        if self.structure == "blocks" and self.units > layer.hidden_size:
            raise ValueError(f"units must be at most the layer's hidden_size={layer.hidden_size}, got {self.units}")


def check_positive(name: str, value: object) -> None:
    """Raise TypeError or ValueError for what is not a finite number above 0."""
    _check_number(name, value, *_POSITIVE)


def _check_number(name: str, value: object, fits: Callable[[Any], bool], wanted: str) -> None:
    if not fits(value):
        kind = ValueError if isinstance(value, numbers.Number) and not isinstance(value, bool) else TypeError
        raise kind(f"{name} must be {wanted}, got {value!r}")


def _real(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, numbers.Real) and not isinstance(value, bool) and fits(value)


def _integer(lowest: int, highest: float = math.inf) -> Callable[[Any], bool]:
    within = _real(lambda value: lowest <= value <= highest)
    return lambda value: isinstance(value, numbers.Integral) and within(value)


def _or_none(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


_CHOICES = {"rule": (None, "deterministic", "stochastic"), "structure": ("elements", "blocks")}
_POSITIVE = (_real(lambda value: 0 < value < math.inf), "a finite number above 0")
_SIZE = (_integer(1, (1 << 31) - 1), f"an integer from 1 to {(1 << 31) - 1}")
_NUMBERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "threshold": (_or_none(_real(lambda value: 0 <= value <= LARGEST)), "a number from 0 that float32 holds"),
    "target": (_or_none(_real(lambda value: 0 <= value < 1)), "a number in [0, 1)"),
    "units": _SIZE,
    "rows": _SIZE,
    "begin_step": (_integer(0), "an integer from 0"),
    "end_step": (_or_none(_integer(0)), "None or an integer from 0"),
    "dense_every": (_or_none(_integer(2)), "None or an integer from 2"),
    "gain": _POSITIVE,
    "seed": (_integer(0, (1 << 32) - 1), "an integer from 0 to 2^32 - 1"),
}
