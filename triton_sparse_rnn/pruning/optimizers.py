"""Optimizers in each other, as wrappers keep them: finding them all, what they remember, and hooks in their steps."""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


def optimizers_in(optimizer: Any) -> list[Any]:
    """Return an optimizer and all that it keeps in attributes, as wrappers do, each once, the outermost first."""
    found = [optimizer]
    for each in found:  # which grows
        for name, value in _attributes(each).items():
            if name not in ("state", "param_groups"):
                found += [one for one in _optimizers_among(value) if all(one is not known for known in found)]
    return found


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


def _attributes(optimizer: Any) -> dict[str, Any]:
    return getattr(optimizer, "__dict__", {})


def _optimizers_among(value: object) -> list[Any]:
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else (value,)
    return [one for one in values if isinstance(one, Optimizer)]


def states_of(optimizers: Iterable[Any]) -> list[Mapping[Any, Any]]:
    states: list[Mapping[Any, Any]] = []
    for optimizer in optimizers:
        state = getattr(optimizer, "state", None)  # None also stands for an optimizer that is gone
        if isinstance(state, Mapping) and all(state is not known for known in states):
            states.append(state)
    return states


def hook_step(optimizer: Any, before: Callable[[Any], None], after: Callable[[Any], None]) -> Callable[[], None]:
    """Call `before(optimizer)` and `after(optimizer)` around each of its steps.

    Returns:
        What takes the hooks off again.
    """
    if _runs_hooks(optimizer):
        handles = contextlib.ExitStack()
        handles.callback(optimizer.register_step_pre_hook(lambda each, args, kwargs: before(each)).remove)
        handles.callback(optimizer.register_step_post_hook(lambda each, args, kwargs: after(each)).remove)
        return handles.close
    return _wrap_step(optimizer, before, after)


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
