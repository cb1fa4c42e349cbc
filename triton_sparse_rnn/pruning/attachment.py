"""Where a pruner meets an optimizer: which of nested ones counts a step, and the hooks in them and in gradients."""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from triton_sparse_rnn.notices import warn
from triton_sparse_rnn.pruning.live_set import LiveSet
from triton_sparse_rnn.pruning.optimizers import (
    find_counting,
    hook_step,
    in_its_own_step,
    optimizers_in,
    parameter_ids,
    states_of,
)
from triton_sparse_rnn.pruning.targets import Weight
from triton_sparse_rnn.pruning.watch import StepWatch
from triton_sparse_rnn.pruning.weight_masks import WeightMasks

_attachments: LiveSet[Attachment] = LiveSet()
_lock = threading.Lock()


class Attachable(Protocol):
    """A `Pruner`, as far as what is in this file calls it."""

    _masks: WeightMasks
    _attachment: Attachment | None

    @property
    def weights(self) -> tuple[Weight, ...]: ...
    @property
    def step_count(self) -> int: ...
    def _start(self) -> None: ...
    def _before_step(self) -> None: ...
    def _advance(self, states: Iterable[Mapping[Any, Any]]) -> None: ...
    def _tell_of_writes(self, names: list[str]) -> None: ...
    def _detach(self) -> None: ...


class Attachment:
    """What `Pruner.attach` returns: the hooks in an optimizer that call the pruner, until `remove()`.

    Of optimizers in each other (Lookahead, SAM, accelerate's wrapper) one counts the steps: see `find_counting`. What
    those around it write after its step is masked when their own step returns.

    Attributes:
        name: of the class that was attached.
        began: whether a step was begun.
        told: whether it was said that the weights are trained without such steps.
    """

    PATIENCE: ClassVar = 10  # steps of another optimizer in a row, as inner loops may make

    def __init__(self, pruner: Attachable, optimizer: Any) -> None:
        check_not_pruned_by_another(pruner)
        counting, outer = find_counting(optimizer, {id(weight.parameter) for weight in pruner.weights})
        self.name = type(optimizer).__name__
        self.began = self.told = False
        self._pruner: Attachable | None = pruner
        self._nested = [weakref.ref(each) for each in optimizers_in(optimizer)]
        self._counting = weakref.ref(counting)
        self._steps_of_others: dict[int, int] = {}  # by id, since the last one that was counted
        self._removers = [hook_step(counting, self._before_step, self._after_step)]
        self._removers += [hook_step(each, self._before_step, self._after_outer) for each in outer]
        _attachments.add(self)
        with _lock:
            _hear_of_all_steps()

    def remove(self) -> None:
        """Take the pruner off the optimizer and off the gradients. A second call does nothing."""
        while self._removers:
            self._removers.pop()()
        _attachments.discard(self)
        pruner, self._pruner = self._pruner, None
        if pruner is not None:
            try:
                pruner._tell_of_writes(pruner._masks.samples.unread())
            finally:
                pruner._detach()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _before_step(self, optimizer: Any) -> None:
        self.began = True
        if self._pruner is not None:
            self._pruner._before_step()

    def _after_step(self, optimizer: Any) -> None:
        self._steps_of_others.clear()
        # A fused optimizer skips a step inside its kernel, by the found_inf that GradScaler gives it for the call.
        found_inf = getattr(optimizer, "found_inf", None)
        if self._pruner is not None and (found_inf is None or not found_inf.item()):
            self._pruner._advance(states_of(each() for each in self._nested))

    def _after_outer(self, optimizer: Any) -> None:
        if self._pruner is not None:
            self._pruner._masks.apply_everywhere(())  # what it remembers was masked when the inner step was counted

    def _hear_of_step(self, optimizer: Any) -> None:
        """Take note of a step of any optimizer; its parameters are looked at only if it makes many in a row."""
        pruner = self._pruner
        if pruner is None or self.told or optimizer is self._counting() or in_its_own_step(optimizer):
            return
        steps = self._steps_of_others[id(optimizer)] = self._steps_of_others.get(id(optimizer), 0) + 1
        if steps <= self.PATIENCE:
            return
        held = parameter_ids(optimizer)
        trained = [weight for weight in pruner.weights if weight.parameter.grad is not None]
        if names := [weight.name for weight in trained if id(weight.parameter) in held]:
            self.told = True
            warn(
                f"another optimizer, of class {type(optimizer).__name__}, made {steps} steps for {', '.join(names)}, "
                f"and the {self.name} that the pruner is attached to has made no step meanwhile, so nothing was "
                "pruned. If the other trains the model now, or is inside a wrapper that steps in other ways, call "
                "remove() of the handle that attach() returned, and attach(that optimizer)"
            )


class GradientHook:
    """Masks a gradient when it is accumulated, and watches from there who trains the weight.

    Holds the pruner weakly: a pruner that is dropped without being attached has no effect and no memory.
    """

    def __init__(self, pruner: Attachable, weight: Weight) -> None:
        self._pruner = weakref.ref(pruner)
        self._weight = weight
        self._watch = StepWatch()
        self._looked_at = 0

    def __call__(self, parameter: Tensor) -> None:
        pruner = self._pruner()
        if pruner is None or parameter.grad is None:
            return
        pruner._start()
        pruner._masks.apply(self._weight, parameter.grad)
        attachment = pruner._attachment
        if attachment is None:
            self._look(pruner)
        elif not (attachment.began or attachment.told) and self._watch.sees_training(parameter):
            attachment.told = True
            warn(
                f"{self._weight.name} has changed before {StepWatch.PATIENCE} backward passes, but the "
                f"{attachment.name} that the pruner is attached to has made no step so far, so nothing is pruned. If "
                "another optimizer trains the model, call remove() of the handle that attach() returned, and "
                "attach(that optimizer); if it is this one, by calls of its own in place of step(), remove() the "
                "handle and call pruner.step(optimizer) after each of its steps"
            )

    def _look(self, pruner: Attachable) -> None:
        """Without hooks in a step look here, once after each: later, inside a closure, values may come and go."""
        if self._looked_at != pruner.step_count:
            self._looked_at = pruner.step_count
            if names := pruner._masks.samples.written([self._weight]):
                pruner._tell_of_writes(names)  # a backward pass writes no weights: `Pruner.step` masks them


def check_not_pruned_by_another(pruner: Attachable) -> None:
    """Refuse weights that an attached pruner prunes, and take off those whose optimizer is gone: they mask gradients.

    Raises:
        ValueError: naming the weights.
    """
    if _pruned_by_another(pruner):
        gc.collect()  # one that nobody holds any more, with its optimizer, in a cycle
    if names := _pruned_by_another(pruner):
        raise ValueError(
            f"another pruner is attached and prunes {', '.join(names)} already: call remove() of the handle that its "
            "attach() returned, or leave these to one of the two by targets={'GLOB': None}"
        )


def _pruned_by_another(pruner: Attachable) -> list[str]:
    taken: set[int] = set()
    for attachment in _attachments:
        other = attachment._pruner
        if other is None or other is pruner:
            continue
        held = {id(weight.parameter) for weight in other.weights}
        if attachment._counting() is not None:
            taken |= held
        elif any(id(weight.parameter) in held for weight in pruner.weights):
            attachment.remove()
    return [weight.name for weight in pruner.weights if id(weight.parameter) in taken]


@functools.cache
def _hear_of_all_steps() -> None:
    """Once in a process, and for ever: torch's dict of hooks must not change while another thread goes through it."""
    register_optimizer_step_post_hook(_after_any_step)


def _after_any_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    if not torch.compiler.is_compiling():  # else it would break the graph of others' steps
        for attachment in _attachments:
            attachment._hear_of_step(optimizer)
