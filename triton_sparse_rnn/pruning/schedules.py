"""When a mask is updated, and how far it prunes at that step: frozen descriptions without state.

Steps are finished optimizer steps, counted from 1; step 0 is before the first. An update at step t sees the weights
after optimizer step t. A unit is what a pattern prunes as a whole, such as a block.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from triton_sparse_rnn.names import clean_name, name_matches
from triton_sparse_rnn.pruning.weights import gate_names, recurrent_weights, split_gates
from triton_sparse_rnn.sparse.patterns import PatternLike, as_pattern
from triton_sparse_rnn.sparse.picks import DEFAULT_PATTERN

_FEWEST_UPDATES = 20  # that a schedule made from the length of a training has, about


class Schedule(abc.ABC):
    """What the pruner asks. A schedule of your own overrides `last_step`, `updates_at` and one of the two others.

    Make it a frozen dataclass: its repr is kept in a checkpoint of the pruner, and compared on loading.
    """

    @property
    @abc.abstractmethod
    def last_step(self) -> int:
        """The step of the last update; the mask is frozen after it."""

    @abc.abstractmethod
    def updates_at(self, step: int) -> bool:
        """Whether the mask is updated at this step."""

    def sparsity_at(self, step: int) -> float | None:
        """The fraction of units, those with the lowest scores, that an update at `step` prunes; None: not by rank."""
        return None

    def threshold_at(self, step: int) -> float | None:
        """The score up to which (inclusive) an update at `step` prunes a unit; None: not by threshold."""
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolynomialDecay(Schedule):
    """Prune by rank, fast at first and ever slower towards the final sparsity (Zhu & Gupta 2017).

        s(t) = s_f + (s_i - s_f) (1 - (t - begin) / (end - begin))^power

    Updates come at begin_step, every `frequency` steps after it, and at end_step, where exactly
    round(final_sparsity * units) units of each gate are pruned.

    Args:
        final_sparsity: s_f, fraction of units in [0, 1).
        begin_step, end_step: first and last update, 0 <= begin_step < end_step.
        initial_sparsity: s_i, the sparsity at begin_step, in [0, final_sparsity].
        frequency: steps between updates (the paper uses 100 to 1000).
        power: above 0; 3 is the paper's cubic, 1 a straight line.

    >>> schedule = PolynomialDecay(final_sparsity=0.9, begin_step=100, end_step=500, frequency=200)
    >>> [step for step in range(1000) if schedule.updates_at(step)]
    [100, 300, 500]
    >>> [round(schedule.sparsity_at(step), 4) for step in (100, 300, 500)]
    [0.0, 0.7875, 0.9]
    """

    final_sparsity: float
    begin_step: int
    end_step: int
    initial_sparsity: float = 0.0
    frequency: int = 100
    power: float = 3.0

    def __post_init__(self) -> None:
        _check_fields(self, _checked_fraction, "final_sparsity", "initial_sparsity")
        _check_fields(self, _checked_step, "begin_step", "end_step")
        _check_fields(self, _checked_positive_integer, "frequency")
        _check_fields(self, _checked_positive, "power")
        if self.initial_sparsity > self.final_sparsity:
            raise ValueError(
                f"initial_sparsity must not exceed final_sparsity={self.final_sparsity}, got {self.initial_sparsity}: "
                "pruned weights do not come back"
            )
        _check_order(self.begin_step, self.end_step)

    @classmethod
    def for_training(cls, total_steps: int, final_sparsity: float = 0.9, **others: Any) -> PolynomialDecay:
        """Choose the steps from the length of a training alone, by the heuristics of Narang et al. (ICLR 2017).

        Pruning begins after 5 % of the steps (the paper: at the second epoch) and ends after half of them, so that as
        many are left to recover; updates come every 100 steps, or more often, so that there are at least about 20.

        What goes with it, by docs/results.md: a learning rate that is held up to end_step, and falls to zero from there
        on, as by `torch.optim.lr_scheduler.LambdaLR(optimizer, rate)`.

        Args:
            total_steps: optimizer steps of the whole training, at least 2.
            final_sparsity: fraction of units in [0, 1).
            **others: arguments of the class; those given are not chosen.

        >>> schedule = PolynomialDecay.for_training(20_000)
        >>> schedule.begin_step, schedule.end_step, schedule.frequency
        (1000, 10000, 100)
        >>> rate = lambda step: min(1.0, (20_000 - step) / (20_000 - schedule.end_step))
        >>> rate(10_000), rate(15_000)
        (1.0, 0.5)
        >>> PolynomialDecay.for_training(600, 0.8, end_step=400).frequency
        18
        """
        begin, _, end, frequency = _paper_steps(total_steps, others)
        return cls(
            **{"final_sparsity": final_sparsity, "begin_step": begin, "end_step": end, "frequency": frequency} | others
        )

    @property
    def last_step(self) -> int:
        return self.end_step

    def updates_at(self, step: int) -> bool:
        on_beat = self.begin_step <= step < self.end_step and (step - self.begin_step) % self.frequency == 0
        return on_beat or step == self.end_step

    def sparsity_at(self, step: int) -> float:
        progress = min(1.0, max(0.0, (step - self.begin_step) / (self.end_step - self.begin_step)))
        return self.final_sparsity + (self.initial_sparsity - self.final_sparsity) * (1 - progress) ** self.power


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThresholdRamp(Schedule):
    """Prune every unit whose score is at most a threshold that rises to q (Narang et al., ICLR 2017, Algorithm 1).

    The threshold rises by theta at each update before ramp_step and by phi = slope_ratio * theta after it:

        eps(t) = theta ((min(t, ramp) - begin) + slope_ratio max(0, t - ramp)) / frequency
        theta = q frequency / ((ramp - begin) + slope_ratio (end - ramp))

    At slope_ratio 1.5 theta is the paper's equation 1. eps(end_step) is exactly q; the paper's program adds 1 to each
    difference, which ends a little above. Updates come every `frequency` steps after begin_step, and at end_step. What
    sparsity comes out depends on the weights: `forecast` predicts it, `from_weights` chooses q for a wanted one.

    Args:
        q: the final threshold, above 0, in units of the score.
        begin_step, ramp_step, end_step: begin < end, ramp between them (paper: the second epoch, 25 % and 50 % of all).
        frequency: steps between updates (paper: 100).
        slope_ratio: phi / theta, above 0 (paper: 1.5 to 2).

    >>> schedule = ThresholdRamp(q=0.1, begin_step=0, ramp_step=400, end_step=800)
    >>> round(schedule.theta, 4), round(schedule.phi, 4)
    (0.01, 0.015)
    >>> [round(schedule.threshold_at(step), 4) for step in (100, 400, 500, 800)]
    [0.01, 0.04, 0.055, 0.1]
    """

    q: float
    begin_step: int
    ramp_step: int
    end_step: int
    frequency: int = 100
    slope_ratio: float = 1.5

    def __post_init__(self) -> None:
        _check_fields(self, _checked_step, "begin_step", "ramp_step", "end_step")
        _check_fields(self, _checked_positive_integer, "frequency")
        _check_fields(self, _checked_positive, "q", "slope_ratio")
        _check_order(self.begin_step, self.end_step)
        if not self.begin_step <= self.ramp_step <= self.end_step:
            raise ValueError(
                f"ramp_step must lie between begin_step={self.begin_step} and end_step={self.end_step}, "
                f"got {self.ramp_step}"
            )

    @classmethod
    def for_training(cls, total_steps: int, q: float, **others: Any) -> ThresholdRamp:
        """Choose the steps from the length of a training alone, as the paper does.

        Pruning begins after 5 % of the steps (the paper: at the second epoch), is faster after 25 %, and ends after
        half of them; updates come every 100 steps, or more often, so that there are at least about 20.

        Args:
            total_steps: optimizer steps of the whole training, at least 2.
            q: the final threshold; `from_weights` takes it, and total_steps, for a wanted sparsity.
            **others: arguments of the class; those given are not chosen.

        >>> schedule = ThresholdRamp.for_training(20_000, q=0.1)
        >>> schedule.begin_step, schedule.ramp_step, schedule.end_step, schedule.frequency
        (1000, 5000, 10000, 100)
        """
        begin, ramp, end, frequency = _paper_steps(total_steps, others)
        return cls(**{"q": q, "begin_step": begin, "ramp_step": ramp, "end_step": end, "frequency": frequency} | others)

    @classmethod
    def from_weights(
        cls,
        model: nn.Module,
        sparsity: float = 0.9,
        *,
        names: str = "*",
        pattern: PatternLike = DEFAULT_PATTERN,
        score: str = "l2",
        tie_gates: bool = False,
        **steps: Any,
    ) -> ThresholdRamp:
        """Take q from a trained dense model: the score below which the fraction `sparsity` of its units lies.

        The paper uses the 90th percentile, and a threshold for each type of layer: call this once for each type with
        its `names`, and give the results to `Pruner(targets=...)`.

        Args:
            model: holds nn.RNN, nn.GRU or nn.LSTM layers, trained, not pruned.
            sparsity: in (0, 1).
            names: a glob over names of recurrent and input weights, whose scores are pooled.
            pattern: this, `score` and `tie_gates` as for the `Pruner` that will use the schedule.
            score: "max", "mean" or "l2".
            tie_gates: whether the units of all gates are scored as one.
            **steps: begin_step, ramp_step, end_step, and the other arguments of the class; or total_steps, and what of
                them `for_training` is not to choose.

        >>> layer = nn.RNN(1, 4, bias=False)
        >>> layer.weight_hh_l0.data = torch.arange(1.0, 17.0).view(4, 4)
        >>> ThresholdRamp.from_weights(
        ...     layer, 0.75, names="weight_hh*", pattern=(1, 1), begin_step=0, ramp_step=5, end_step=10
        ... ).q
        12.0
        """
        sparsity = _checked_fraction("sparsity", sparsity)
        pattern = as_pattern(pattern)
        if not isinstance(names, str):
            raise TypeError(f"names must be a glob such as '*weight_hh*', got {names!r}")
        pooled = []
        for path, module, attribute in recurrent_weights(model):
            if name_matches(clean_name(path), names):
                weight = split_gates(getattr(module, attribute).detach(), len(gate_names(module)))
                pattern.check_size(weight.shape[1], weight.shape[2], f"each gate of {clean_name(path)}")
                scores = pattern.scores(weight, score)
                pooled.append((pattern.combine_gates(scores, score) if tie_gates else scores).flatten())
        if not pooled:
            raise ValueError(f"names={names!r} matched no recurrent or input weight of an nn.RNN, nn.GRU or nn.LSTM")
        scores = torch.cat(pooled)
        count = round(sparsity * len(scores))
        q = scores.kthvalue(count).values.item() if count else 0.0
        if not 0 < q < math.inf:
            raise ValueError(
                f"sparsity={sparsity} of {pattern.describe(len(scores))} gives q={q}, which must be positive and finite"
            )
        return cls.for_training(q=q, **steps) if "total_steps" in steps else cls(q=q, **steps)

    @property
    def theta(self) -> float:
        """What the threshold rises by at an update before ramp_step."""
        return self.q * self.frequency / self._weighted_steps(self.end_step)

    @property
    def phi(self) -> float:
        """What the threshold rises by at an update after ramp_step."""
        return self.slope_ratio * self.theta

    @property
    def last_step(self) -> int:
        return self.end_step

    def updates_at(self, step: int) -> bool:
        on_beat = self.begin_step < step < self.end_step and (step - self.begin_step) % self.frequency == 0
        return on_beat or step == self.end_step

    def threshold_at(self, step: int) -> float:
        return self.q * (self._weighted_steps(step) / self._weighted_steps(self.end_step))

    def _weighted_steps(self, step: int) -> float:
        """Steps since begin_step, those after ramp_step counted slope_ratio times."""
        step = min(self.end_step, max(self.begin_step, step))
        return (min(step, self.ramp_step) - self.begin_step) + self.slope_ratio * max(0, step - self.ramp_step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneShot(Schedule):
    """Prune by rank once: the hard pruning that the paper compares with (gradual pruning is more accurate).

    >>> schedule = OneShot(sparsity=0.9, step=1000)
    >>> schedule.updates_at(999), schedule.updates_at(1000), schedule.sparsity_at(1000)
    (False, True, 0.9)
    """

    sparsity: float
    step: int

    def __post_init__(self) -> None:
        _check_fields(self, _checked_fraction, "sparsity")
        _check_fields(self, _checked_step, "step")

    @property
    def last_step(self) -> int:
        return self.step

    def updates_at(self, step: int) -> bool:
        return step == self.step

    def sparsity_at(self, step: int) -> float:
        return self.sparsity if step >= self.step else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstantMask(Schedule):
    """Keep the zeros there are: to go on training a checkpoint that is pruned already.

    A unit is pruned when all its weights are zero at the moment the first gradient of the training arrives, or else
    an attached optimizer is about to step, so the checkpoint may be loaded before or after the pruner is made. A weight
    without such a unit is named in a warning, and is an error if it is so of all.

    >>> ConstantMask().updates_at(0), ConstantMask().updates_at(1), ConstantMask().threshold_at(0)
    (True, False, 0.0)
    """

    @property
    def last_step(self) -> int:
        return 0

    def updates_at(self, step: int) -> bool:
        return step == 0

    def threshold_at(self, step: int) -> float:
        return 0.0


def _paper_steps(total_steps: object, chosen: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Return begin, ramp, end and frequency for a training, those in `chosen` as they are."""
    total = _checked_integer("total_steps", total_steps, least=2)
    begin = _checked_step("begin_step", chosen.get("begin_step", total // 20))
    end = _checked_step("end_step", chosen.get("end_step", max(total // 2, begin + 1)))
    ramp = chosen.get("ramp_step", min(max(total // 4, begin), end))
    if end > total:
        raise ValueError(f"end_step={end} lies behind the training's last step, total_steps={total}")
    return begin, ramp, end, max(1, min(100, (end - begin) // _FEWEST_UPDATES))


def _check_fields(schedule: Schedule, checked: Callable[[str, object], float], *names: str) -> None:
    """Check each field, and keep it as a plain number: a checkpoint holds and compares the repr of a schedule."""
    for name in names:
        object.__setattr__(schedule, name, checked(name, getattr(schedule, name)))


def _checked_fraction(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number in [0, 1), got {value!r}")
    if not 0 <= float(value) < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")
    return float(value)


def _checked_positive(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number above 0, got {value!r}")
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
    return float(value)


def _checked_step(name: str, value: object) -> int:
    return _checked_integer(name, value, least=0)


def _checked_positive_integer(name: str, value: object) -> int:
    return _checked_integer(name, value, least=1)


def _checked_integer(name: str, value: object, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if int(value) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def _check_order(begin_step: int, end_step: int) -> None:
    if begin_step >= end_step:
        raise ValueError(f"end_step must come after begin_step={begin_step}, got {end_step}")
