"""Where a pruner meets an optimizer: which of nested ones counts a step, and the hooks in them and in gradients."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from triton_sparse_rnn.notices import warn
from triton_sparse_rnn.pruning.optimizers import hook_step, optimizers_in, parameter_ids, states_of
from triton_sparse_rnn.pruning.targets import Weight
from triton_sparse_rnn.pruning.watch import StepWatch

if TYPE_CHECKING:
    from triton_sparse_rnn.pruning.pruner import Pruner

_attachments: weakref.WeakSet[Attachment] = weakref.WeakSet()


class Attachment:
    """What `Pruner.attach` returns: the hooks in an optimizer that call the pruner, until `remove()`.

    Of optimizers in each other (Lookahead, SAM, accelerate's wrapper) the innermost that has all pruned weights counts
    the steps. What those around it write after its step is masked when their own step returns.

    Attributes:
        name: of the class that was attached.
        steps_seen: calls of the counting optimizer's step, those that a GradScaler made void too.
        in_step: whether an optimizer is at work, which may call backward() in a closure.
        told: whether it was said that the weights are trained without such calls.
    """

    def __init__(self, pruner: Pruner, optimizer: Any) -> None:
        _check_not_pruned_by_another(pruner)
        nested = optimizers_in(optimizer)
        pruned = {id(weight.parameter) for weight in pruner.weights}
        *outer, counting = [each for each in nested if pruned <= parameter_ids(each)]
        self.name = type(optimizer).__name__
        self.steps_seen = 0
        self.in_step = self.told = False
        self._pruner: Pruner | None = pruner
        self._nested = [weakref.ref(each) for each in nested]
        self._counting = weakref.ref(counting)
        # A compiled optimizer.step leaves the hooks out: they count, which would compile it anew at every step.
        disabled: Any = torch.compiler.disable
        before, after, after_outer = map(disabled, (self._before_step, self._after_step, self._after_outer))
        self._removers = [hook_step(counting, before, after)]
        self._removers += [hook_step(each, before, after_outer) for each in outer]
        _attachments.add(self)

    def remove(self) -> None:
        """Take the pruner off the optimizer and off the gradients. A second call does nothing."""
        while self._removers:
            self._removers.pop()()
        _attachments.discard(self)
        if self._pruner is not None:
            self._pruner._detach()
            self._pruner = None

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _before_step(self, optimizer: Any) -> None:
        self.in_step = True
        if self._pruner is not None:
            self._pruner._before_step()

    def _after_step(self, optimizer: Any) -> None:
        self.in_step = False
        self.steps_seen += 1
        # A fused optimizer skips a step inside its kernel, by the found_inf that GradScaler gives it for the call.
        found_inf = getattr(optimizer, "found_inf", None)
        if self._pruner is not None and (found_inf is None or not found_inf.item()):
            self._pruner._advance(states_of(each() for each in self._nested))

    def _after_outer(self, optimizer: Any) -> None:
        self.in_step = False
        if self._pruner is not None:
            self._pruner._masks.apply_everywhere(())  # what it remembers was masked when the inner step was counted


class GradientHook:
    """Masks a gradient when it is accumulated, and watches from there who trains the weight.

    Holds the pruner weakly: a pruner that is dropped without being attached has no effect and no memory.
    """

    def __init__(self, pruner: Pruner, weight: Weight) -> None:
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
        elif not (attachment.in_step or attachment.told) and self._watch.others_step(
            parameter, attachment.steps_seen, pruner._masks.own_writes[self._weight.name]
        ):
            attachment.told = True
            warn(
                f"{self._weight.name} was written to before each of the last {StepWatch.PATIENCE} backward passes, but "
                f"the {attachment.name} that the pruner is attached to has made no step, so nothing more is pruned. If "
                "another optimizer trains the model now, call remove() of the handle that attach() returned, and "
                "attach(that optimizer); if one steps by itself inside a wrapper, attach to that one"
            )

    def _look(self, pruner: Pruner) -> None:
        """Without hooks in a step look here, once after each: later, inside a closure, values may come and go."""
        if self._looked_at != pruner.step_count:
            self._looked_at = pruner.step_count
            if names := pruner._masks.samples.written([self._weight]):
                pruner._tell_of_writes(names)  # a backward pass writes no weights: `Pruner.step` masks them


def _check_not_pruned_by_another(pruner: Pruner) -> None:
    if _pruned_by_another(pruner):
        gc.collect()  # one that nobody holds any more, with its optimizer, in a cycle
    if names := _pruned_by_another(pruner):
        raise ValueError(
            f"another pruner is attached and prunes {', '.join(names)} already: call remove() of the handle that its "
            "attach() returned, or leave these to one of the two by targets={'GLOB': None}"
        )


def _pruned_by_another(pruner: Pruner) -> list[str]:
    others = [attachment._pruner for attachment in _attachments if attachment._counting() is not None]
    taken = {id(weight.parameter) for other in others if other is not None for weight in other.weights}
    return [weight.name for weight in pruner.weights if id(weight.parameter) in taken]
