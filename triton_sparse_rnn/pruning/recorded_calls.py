"""What recurrent layers return while their model is called, written down by hooks."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

_numbers = itertools.count()


@dataclasses.dataclass(eq=False)
class RecordedCall:
    """One call of a model.

    Attributes:
        args, kwargs: what it was called with.
        outputs: by layer, the output sequence of each of its calls, in their order: a tensor [..., H * D].
        autocast: the type of its device, and the dtype of autocast there, None where that is off; None where a device
            has none.
        result: what it returned, where that is kept.
        taught: the teacher's call that it is compared with, once that is known.
        spent: whether it was compared.
        number: in the order of all calls.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: dict[str, list[Tensor]] = dataclasses.field(default_factory=dict)
    autocast: tuple[str, torch.dtype | None] | None = None
    result: Any = None
    taught: RecordedCall | None = None
    spent: bool = False
    number: int = dataclasses.field(default_factory=lambda: next(_numbers))

    def follows(self, other: RecordedCall) -> bool:
        """Whether it came after another call, or has the very same first argument."""
        first, others_first = (next(itertools.chain(call.args, call.kwargs.values()), None) for call in (self, other))
        return self.number > other.number or (first is not None and first is others_first)

    def autocasting(self) -> contextlib.AbstractContextManager[Any]:
        """Run under the same autocast."""
        if self.autocast is None:
            return contextlib.nullcontext()
        device_type, dtype = self.autocast
        return torch.autocast(device_type, dtype=dtype, enabled=dtype is not None)

    def spend(self) -> None:
        """Let go of all tensors but those of the results."""
        self.args, self.kwargs, self.outputs, self.spent = (), {}, {}, True
        if self.taught is not None:
            self.taught.spend()


class CallRecorder:
    """Writes down what layers return while a call is open; of a model that learns, hooks in it open and end one.

    Attributes:
        last: the last call that ended.
        ran_outside: whether a layer ran, in training, since the last call of its model, as in one of a part of it.
    """

    def __init__(self, layers: Mapping[str, nn.RNNBase], *, learner: nn.Module | None = None) -> None:
        """Hook the layers.

        Args:
            layers: by name.
            learner: the model, whose calls in training mode with gradients are recorded. Its layers' outputs are kept
                with the graph that they came from. None leaves it to the caller to say when, and detaches outputs.
        """
        self.last: RecordedCall | None = None
        self.ran_outside = False
        self._open: RecordedCall | None = None
        self._learner = learner
        handles = [
            layer.register_forward_hook(_Hook(weakref.WeakMethod(self._after_layer), name))
            for name, layer in layers.items()
        ]
        if learner is not None:  # after its layers: it may itself be one, which is then heard before its call ends
            before, after = weakref.WeakMethod(self._before_learner), weakref.WeakMethod(self._after_learner)
            handles.append(learner.register_forward_pre_hook(_Hook(before), with_kwargs=True))
            handles.append(learner.register_forward_hook(_Hook(after)))
        self._finalizer = weakref.finalize(self, _remove, handles)
        self._finalizer.atexit = False

    def remove(self) -> None:
        """Take the hooks off and forget what they wrote."""
        self._finalizer()
        self._learner = self.last = self._open = None

    @contextlib.contextmanager
    def recording(self, call: RecordedCall) -> Iterator[None]:
        """Write into `call`, which is the last one if it does not fail."""
        self.last, self._open = None, call
        try:
            yield
            self.last = call
        finally:
            self._open = None

    def take(self) -> RecordedCall | None:
        """Hand the last call over."""
        call, self.last = self.last, None
        return call

    def _before_learner(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._learner is None or not self._learns(model):
            self._open = None  # what failed is not gone on with
            return
        if getattr(model, "_is_replica", False):
            raise RuntimeError(
                "the replicas of nn.DataParallel cannot be recorded for a Distillation: use DistributedDataParallel"
            )
        self.last, self.ran_outside = None, False
        self._open = RecordedCall(args, kwargs, autocast=_autocast_of(model))

    def _after_learner(self, model: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        if self._open is not None:
            self.last, self._open = self._open, None

    def _after_layer(self, name: str, layer: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        if self._open is not None:
            y = _sequence_of(name, layer, result)
            self._open.outputs.setdefault(name, []).append(y.detach() if self._learner is None else y)
        elif self._learner is not None and self._learns(layer):
            self.ran_outside = True

    @staticmethod
    def _learns(module: nn.Module) -> bool:
        return module.training and torch.is_grad_enabled()


class _Hook:
    """One hook; a copy of it, or what was pickled, does nothing: it is in a model that nobody records.

    A compiled model leaves it out, for it breaks the graph where nn.RNNBase does so anyway.
    """

    _run: Callable[..., None] | None = None

    def __init__(self, method: weakref.WeakMethod[Any], *given: Any) -> None:
        def run(*call: Any) -> None:
            bound = method()
            if bound is not None:
                bound(*given, *call)

        disabled: Any = torch.compiler.disable
        self._run = disabled(run)

    def __call__(self, *call: Any) -> None:
        if self._run is not None:
            self._run(*call)

    def __getstate__(self) -> dict[str, Any]:
        return {}


def drop_hooks(model: nn.Module) -> None:
    """Take out of a copied model what was copied of hooks."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook)]:
                del hooks[key]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, without gradients, and each of its modules back afterwards."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()


def _autocast_of(model: nn.Module) -> tuple[str, torch.dtype | None] | None:
    device_type = next((parameter.device.type for parameter in model.parameters()), "cpu")
    if not torch.amp.is_autocast_available(device_type):
        return None
    enabled = torch.is_autocast_enabled(device_type)
    return device_type, torch.get_autocast_dtype(device_type) if enabled else None


def _sequence_of(name: str, layer: nn.Module, result: Any) -> Tensor:
    """What a layer returned for all steps, of subclasses too that return it alone."""
    y = result[0] if isinstance(result, tuple) and not isinstance(result, PackedSequence) else result
    y = y.data if isinstance(y, PackedSequence) else y
    if not isinstance(y, Tensor):
        raise TypeError(
            f"{name or 'the model'} must return its output sequence, or that and its state, as nn.RNN, nn.GRU and "
            f"nn.LSTM do, but this {type(layer).__name__} returned a {type(result).__name__}: leave it out by layers="
        )
    return y
