"""Optimizers in each other, as wrappers keep them: finding them all, what they remember, and hooks in their steps."""

from __future__ import annotations

import contextlib
import functools
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Of wrappers that write no weights themselves.
_PASSING_ON = ("accelerate.", "lightning.fabric.", "lightning_fabric.", "lightning.pytorch.", "pytorch_lightning.")
_HOOKED_STEP = Optimizer.profile_hook_step(lambda: None).__code__  # what torch makes of the step of every class


def optimizers_in(optimizer: Any, without: Iterable[Any] = ()) -> list[Any]:
    """Return an optimizer and all that it keeps in attributes, as wrappers do, each once, the outermost first."""
    found, left_out = [optimizer], list(without)
    for each in found:  # which grows
        for name, value in _attributes(each).items():
            if name not in ("state", "param_groups"):
                found += [one for one in _optimizers_among(value) if not _contains(found + left_out, one)]
    return found


def find_counting(optimizer: Any, pruned: set[int]) -> tuple[Any, list[Any]]:
    """Return which of optimizers in each other counts the steps, and those around it that may write when it is done.

    It is the innermost that has all parameters of these ids. Where several have them side by side, as in wrappers that
    change from one to another, the one around them counts.
    """
    passed = [optimizer]
    while True:
        inside = {
            id(each): optimizers_in(each, passed)
            for each in optimizers_in(passed[-1], passed)[1:]
            if pruned <= parameter_ids(each)
        }
        deeper = {id(one) for nested in inside.values() for one in nested[1:]}
        nearest = [nested[0] for name, nested in inside.items() if name not in deeper]
        if len(nearest) != 1:
            *around, counting = passed
            return counting, [each for each in around if not type(each).__module__.startswith(_PASSING_ON)]
        passed += nearest


def is_optimizer(value: object) -> bool:
    """Whether a pruner can follow it: torch's, or a wrapper that acts like one without being a subclass."""
    return isinstance(value, Optimizer) or (
        not isinstance(value, (type, nn.Module))
        and all(hasattr(value, name) for name in ("step", "zero_grad", "param_groups"))
    )


def parameter_ids(optimizer: Any) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def state_tensors(state: Mapping[Any, Any], parameter: Tensor) -> Iterator[Tensor]:
    """Yield what an optimizer remembers of a parameter in tensors of its shape: momentum and the like."""
    entry = state.get(parameter, ())
    values = entry.values() if isinstance(entry, Mapping) else entry if isinstance(entry, (list, tuple)) else (entry,)
    for value in values:
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
            yield value


def _contains(optimizers: list[Any], one: Any) -> bool:
    return any(one is each for each in optimizers)


def _attributes(optimizer: Any) -> dict[str, Any]:
    return getattr(optimizer, "__dict__", {})


def _optimizers_among(value: object) -> list[Any]:
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else (value,)
    return [one for one in values if isinstance(one, Optimizer)]


def states_of(optimizers: Iterable[Any]) -> list[Mapping[Any, Any]]:
    states: list[Mapping[Any, Any]] = []
    for optimizer in optimizers:
        state = getattr(optimizer, "state", None)  # None also stands for an optimizer that is gone
        if isinstance(state, Mapping) and not _contains(states, state):
            states.append(state)
    return states


def hook_step(optimizer: Any, before: Callable[[Any], None], after: Callable[[Any], None]) -> Callable[[], None]:
    """Call `before(optimizer)` and `after(optimizer)` around each of its steps, a `super().step()` inside left out.

    Returns:
        What takes the hooks off again.
    """
    # A compiled optimizer.step leaves the hooks out: they count, which would compile it anew at every step.
    disabled: Any = torch.compiler.disable
    if _runs_hooks(optimizer):
        handles = contextlib.ExitStack()
        handles.callback(optimizer.register_step_pre_hook(disabled(_of_whole_steps(before))).remove)
        handles.callback(optimizer.register_step_post_hook(disabled(_of_whole_steps(after))).remove)
        return handles.close
    return _wrap_step(optimizer, disabled(before), disabled(after))


def in_its_own_step(optimizer: Any) -> bool:
    """Whether a hook is called by a step inside another step of the same optimizer, as super().step() is.

    The stack tells, since a count of steps that were entered goes wrong with the first exception.
    """
    if not _may_step_inside(type(optimizer)):
        return False
    steps, frame = 0, sys._getframe(1)
    while frame is not None:
        steps += frame.f_code is _HOOKED_STEP and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return steps > 1


@functools.lru_cache
def _may_step_inside(kind: type) -> bool:
    return sum("step" in vars(base) for base in kind.__mro__ if base is not Optimizer) > 1


def _of_whole_steps(call: Callable[[Any], None]) -> Callable[[Any, Any, Any], None]:
    def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
        if not in_its_own_step(optimizer):
            call(optimizer)

    return hook


def _runs_hooks(optimizer: Any) -> bool:
    """Whether `optimizer.step()` calls hooks that are registered in this very object.

    Wrappers often skip `Optimizer.__init__`, or hand `register_step_post_hook` on to the optimizer inside. torch marks
    a step that calls hooks as `hooked`, and what wraps one by functools.wraps, as learning-rate schedulers do, has it.
    """
    own = _attributes(optimizer)
    return "_optimizer_step_post_hooks" in own and getattr(own.get("step", type(optimizer).step), "hooked", False)


def _wrap_step(optimizer: Any, before: Callable[[Any], None], after: Callable[[Any], None]) -> Callable[[], None]:
    previous = _attributes(optimizer).get("step")
    attached = weakref.ref(optimizer)

    @functools.wraps(optimizer.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        inner = functools.partial(type(self).step, self) if previous is None else previous
        if self is not attached():  # a deep copy
            return inner(*args, **kwargs)
        before(self)
        result = inner(*args, **kwargs)
        after(self)
        return result

    # A bound method, for learning-rate schedulers wrap its __func__, and a deep copy must step itself.
    optimizer.step = types.MethodType(step, optimizer)
    del vars(step)["__wrapped__"]  # else it would keep the optimizer, as `previous` may
    installed = weakref.ref(step)
    vars(step)["previous"] = previous

    def remove() -> None:
        found = attached()
        function = getattr(_attributes(found).get("step"), "__func__", None)
        if found is None or function is None or function is not installed():
            return  # what was wrapped around it since calls hooks that do nothing any more
        if function.previous is None:
            del found.step
        else:
            found.step = function.previous

    return remove
