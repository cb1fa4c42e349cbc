"""What the callbacks share: the pruner of a training, made once the trainer knows its model, optimizers and steps."""

from __future__ import annotations

import math
import reprlib
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from torch import nn
from torch.optim import Optimizer

from triton_sparse_rnn.pruning.attachment import Attachment
from triton_sparse_rnn.pruning.live_set import LiveSet
from triton_sparse_rnn.pruning.optimizers import parameter_ids
from triton_sparse_rnn.pruning.pruner import Pruner
from triton_sparse_rnn.pruning.schedules import PolynomialDecay, Schedule
from triton_sparse_rnn.pruning.targets import Target
from triton_sparse_rnn.sparse.patterns import PatternLike

if TYPE_CHECKING:
    from typing_extensions import Unpack


_attached: LiveSet[PrunedTraining] = LiveSet()


class PrunerOptions(TypedDict, total=False):
    """The keyword arguments of `Pruner`, whose defaults hold."""

    pattern: PatternLike
    score: str
    targets: Mapping[str, Target] | None
    tie_gates: bool
    balanced: bool | None
    split: str
    include: Iterable[str]


class PrunedTraining:
    """What a callback is besides the hooks of its trainer. It copies and pickles as its settings, without the pruner.

    Attributes:
        pruner: None until the first training starts; kept, taken off the optimizer, when training ends.
    """

    pruner: Pruner | None = None
    _attachment: Attachment | None = None
    _training: weakref.ref[Any] | None = None
    _total_steps: int | None = None  # that an automatic schedule was made for
    _ends_late = False

    def __init__(
        self,
        schedule: Schedule | Callable[[int], Schedule] | None = None,
        *,
        final_sparsity: float | None = None,
        **options: Unpack[PrunerOptions],
    ) -> None:
        """Take the settings; nothing else happens before training starts.

        Args:
            schedule: for each weight that `targets` does not match. A function is called with the number of optimizer
                steps that the trainer plans, as in `lambda steps: ThresholdRamp.for_training(steps, q=0.1)`. None takes
                `PolynomialDecay.for_training`.
            final_sparsity: fraction of units in [0, 1), in place of `schedule`; None is the default of that method.
            **options: pattern, score, targets, tie_gates, balanced, split and include, as for `Pruner`.

        Raises:
            TypeError, ValueError: an argument is wrong. What the model must know of is found out when training starts.
        """
        if schedule is not None and not isinstance(schedule, Schedule) and not callable(schedule):
            raise TypeError(f"schedule must be a schedule or a function of the number of steps, got {schedule!r}")
        if schedule is not None and final_sparsity is not None:
            raise ValueError("give schedule or final_sparsity, not both: a schedule has its own final sparsity")
        if unknown := sorted(options.keys() - PrunerOptions.__annotations__.keys()):
            raise TypeError(f"{type(self).__name__} got unknown arguments: {', '.join(unknown)}")
        if schedule is None:
            PolynomialDecay.for_training(100, **_given(final_sparsity))  # complain of it now
        self._schedule = schedule
        self._final_sparsity = final_sparsity
        self._options = options

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("_schedule", "_final_sparsity", "_options")}

    def _start(
        self,
        training: object,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        steps_left: float,
        saved: Mapping[str, Any] | None = None,
    ) -> None:
        """Attach a pruner: the one of `saved`, else the one of the last training of this model, else a new one.

        Args:
            training: what stands for it, the same object for all callbacks of one training.
            model: on its device, with the weights that training starts from.
            optimizers: of the training; one of them must hold all weights that are pruned.
            steps_left: that the trainer will take, infinity if it does not know.
            saved: what `_progress` returned.

        Raises:
            ValueError: `saved` is nothing of the kind.
        """
        if saved is not None:
            self._check_saved(saved)
        self._detach()  # from a training that failed
        self._check_alone(training)
        pruner = self.pruner if saved is None else None
        if pruner is None or not pruner.step_count or not all(weight.in_model(model) for weight in pruner.weights):
            schedule = self._make_schedule(steps_left, saved)
            pruner = Pruner(model, schedule, **self._options)
            if saved is not None:
                pruner.load_state_dict(saved["pruner"])
        self._leave_abandoned(pruner)
        self._attachment = pruner.attach(_optimizer_of(pruner, optimizers))
        self._training = weakref.ref(training)
        _attached.add(self)
        self.pruner = pruner
        self._ends_late = False
        self._check_end(pruner.step_count + steps_left)

    def _check_saved(self, saved: object) -> None:
        if isinstance(saved, Mapping) and saved.keys() == {"total_steps", "pruner"}:
            steps = saved["total_steps"]
            if isinstance(saved["pruner"], Mapping) and (steps is None or (type(steps) is int and steps >= 2)):
                return
        raise ValueError(self._not_its_progress(saved))

    def _not_its_progress(self, saved: object) -> str:
        return (
            f"the checkpoint has a progress of {type(self).__name__} that this callback did not save: it must have "
            f"total_steps (an integer from 2, or None) and pruner (a state of Pruner), got {reprlib.repr(saved)}. "
            "Train from another checkpoint, or load its weights and begin anew"
        )

    def _check_end(self, last_planned: float) -> None:
        """Warn, once, if training ends before pruning."""
        assert self.pruner is not None
        last_step = _last_step(self.pruner)
        if last_step > last_planned and not self._ends_late:
            self._ends_late = True
            warnings.warn(
                f"pruning is planned until step {last_step}, but training ends at step {int(last_planned)}: weights "
                "will be less sparse than wanted. Train longer, or choose a shorter schedule",
                stacklevel=2,
            )

    def _stop(self) -> None:
        """Take the pruner off the optimizer, at the regular end of training."""
        if self._attachment is None or self.pruner is None:
            return
        self.pruner._look(wait=True)  # what other callbacks wrote at last
        self._detach()
        if not self.pruner.finished and not self._ends_late:
            warnings.warn(
                f"training ended at step {self.pruner.step_count}, but pruning was planned until step "
                f"{_last_step(self.pruner)}: the weights are {100 * self.pruner.sparsity:.1f} % sparse",
                stacklevel=2,
            )

    def _detach(self) -> None:
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None
            _attached.discard(self)

    def _check_alone(self, training: object) -> None:
        for other in _attached:
            if other is not self and other._training is not None and other._training() is training:
                raise ValueError(
                    f"a trainer takes one {type(self).__name__}, since its state is kept by the name of the class, got "
                    "two: give one callback the schedules of all weights by targets={'GLOB': schedule}"
                )

    def _leave_abandoned(self, pruner: Pruner) -> None:
        """Take callbacks of trainings that were given up, which nobody told of it, off the weights of this one."""
        weights = {id(weight.parameter) for weight in pruner.weights}
        for other in _attached:
            if other.pruner is not None and any(id(weight.parameter) in weights for weight in other.pruner.weights):
                other._detach()

    def _progress(self) -> dict[str, Any]:
        """What a checkpoint must hold; nothing before training."""
        if self.pruner is None:
            return {}
        return {"total_steps": self._total_steps, "pruner": self.pruner.state_dict()}

    def _make_schedule(self, steps_left: float, saved: Mapping[str, Any] | None) -> Schedule:
        """Make the schedule; it stays what it was if training goes on with another number of steps."""
        if isinstance(self._schedule, Schedule):
            return self._schedule
        total_steps = None if saved is None else saved["total_steps"]
        if total_steps is None:
            if not math.isfinite(steps_left):
                raise ValueError(
                    "the trainer does not know how many steps the optimizer of the pruned weights will take, so that "
                    "no schedule can be chosen: limit its epochs (or max_steps, which several optimizers share), or "
                    "give schedule=PolynomialDecay(...)"
                )
            if steps_left < 1:
                raise ValueError(
                    "the trainer plans no further step, so there is nothing to prune in: train longer, or give "
                    "schedule=PolynomialDecay(...)"
                )
            total_steps = max(2, int(steps_left))  # a trial run has a single step, a schedule at least two
        self._total_steps = total_steps
        if self._schedule is not None:
            return self._schedule(total_steps)
        return PolynomialDecay.for_training(total_steps, **_given(self._final_sparsity))


def _given(final_sparsity: float | None) -> dict[str, float]:
    return {} if final_sparsity is None else {"final_sparsity": final_sparsity}


def _last_step(pruner: Pruner) -> int:
    return max(schedule.last_step for weight in pruner.weights for schedule in weight.schedules if schedule is not None)


def _optimizer_of(pruner: Pruner, optimizers: Sequence[Optimizer]) -> Optimizer:
    """The optimizer of all weights; with a single one, `Pruner.attach` says what it lacks."""
    held = {
        index: [weight.name for weight in pruner.weights if id(weight.parameter) in parameter_ids(optimizer)]
        for index, optimizer in enumerate(optimizers)
    }
    held = {index: names for index, names in held.items() if names}
    if len(held) > 1:
        described = "; ".join(f"optimizer {index} has {', '.join(names)}" for index, names in held.items())
        raise ValueError(
            f"one optimizer must have all weights that are pruned, and no other may have them, but {described}. "
            "Leave out those of all but one by targets={'GLOB': None}"
        )
    return optimizers[next(iter(held), 0)]
