"""Distillation: a trained dense model teaches the one that is being pruned, by its layers and its predictions."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from triton_sparse_rnn.names import unwrapped
from triton_sparse_rnn.pruning.recorded_calls import CallRecorder, RecordedCall, evaluating
from triton_sparse_rnn.pruning.teachers import choose_layers, frozen_copy, listed, match_layers, place_of


class Distillation:
    """Teach a model that is being pruned what a trained dense one, mostly its own former self, makes of the same input.

    `loss()` compares the output sequences of recurrent layers (hints, Romero et al. 2015); `taught` is what the teacher
    returned, for a term of one's own, such as `divergence`. Both are about the model's last call in training mode:
    call `loss()` once after each. A model may be called through wrappers (torch.compile, DistributedDataParallel,
    accelerate, Lightning), and be pruned or not.

    The teacher is no part of the model: neither its parameters nor its state_dict nor its checkpoints have it. In eval
    mode or without gradients nothing is recorded. A copy of the model is free of this; a copy of this, or one that was
    pickled, is as after `remove()`, for it belongs to no model.

    >>> model = nn.GRU(8, 32)  # and trained
    >>> with Distillation(model) as distillation:
    ...     x = torch.randn(5, 2, 8)
    ...     y, _ = model(x)
    ...     same = distillation.loss().item()
    ...     _ = nn.init.zeros_(model.weight_hh_l0)  # in place of a pruner
    ...     y, _ = model(x)
    ...     loss = y.square().mean() + distillation.loss()
    >>> same < 1e-9, loss.item() > y.square().mean().item()
    (True, True)
    """

    _model: nn.Module | None = None  # of copies, and after remove()
    _teacher: nn.Module
    _recorder: CallRecorder
    _teachers_recorder: CallRecorder

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None = None,
        *,
        layers: Iterable[str] | None = None,
        weight: float = 1.0,
    ) -> None:
        """Find the layers in both models, and hook them.

        Names are those of `model.named_modules()`, without what wrappers add.

        Args:
            model: the one to call: in a LightningModule whose training_step calls self.net(x), that is self.net.
            teacher: a trained model that takes the same arguments. It is called in eval mode without gradients, and
                otherwise left as it is. None takes a copy of the model as it is now, without gradients: make it of the
                trained dense model, before pruning begins and after a checkpoint was loaded.
            layers: globs of names of the nn.RNN, nn.GRU and nn.LSTM layers (or subclasses) to compare. None compares
                all that the model has, and () none, for `taught` alone.
            weight: what `loss()` is multiplied by, 0 or more; an attribute that may be changed.

        Raises:
            TypeError, ValueError: a bad argument, no such layer, a glob that matches none, or a teacher that lacks a
                layer, has it with outputs of another size, or shares it with the model; or a model that cannot be
                copied.

        Warns:
            UserWarning: a copy that is made for a teacher has many zeros: it was pruned already.
        """
        self.weight = _checked("weight", weight, "a number of 0 or more", zero=True)
        for name, value in {"model": model, "teacher": model if teacher is None else teacher}.items():
            if not isinstance(value, nn.Module):
                raise TypeError(f"{name} must be an nn.Module, got {type(value).__name__}")
        inside = unwrapped(model)
        found = choose_layers(inside, layers)
        self._teacher = frozen_copy(inside) if teacher is None else teacher
        matched = match_layers(inside, found, unwrapped(self._teacher))
        self._layers = tuple(found)
        self._dtype = place_of(inside)[1]
        self._recorder = CallRecorder(found, learner=inside)
        self._teachers_recorder = CallRecorder(matched)
        self._model = inside

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers that are compared; "" is a model that is a layer itself."""
        return self._layers if self._model is not None else ()

    @property
    def taught(self) -> Any:
        """What the teacher returned for the model's last call in training mode; None before there was one.

        The teacher is called for it where `loss()` or the user has not done so.
        """
        call = None if self._model is None else self._recorder.last
        return None if call is None else self._taught_for(call).result

    def teacher(self, *args: Any, **kwargs: Any) -> Any:
        """Call the teacher, in eval mode without gradients, and return what it returns.

        `loss()` and `taught` do so themselves, with the arguments of the model's last call and under its autocast. Only
        a loop in which these would be wrong has to: one that carries a state along, since a teacher goes on from its
        own state. Call it after the model, or before it with the same first argument.

            scores, state = model(x, state)
            taught, teacher_state = distillation.teacher(x, teacher_state)
            loss = ... + distillation.loss()

        The teacher moves to the device of the model's first parameter, if it is elsewhere, and follows its dtype where
        that was changed.
        """
        self._follow()
        call = RecordedCall(args, kwargs)
        with self._teachers_recorder.recording(call), evaluating(self._teacher):
            call.result = self._teacher(*args, **kwargs)
        return call.result

    def loss(self) -> Tensor:
        """Return how far the layers' output sequences are from the teacher's, for the last call of the model.

        Of each layer, summed over all its calls in the model's (a decoder may call it for each step):

            sum |y - y_teacher|^2 / sum |y_teacher|^2

        in float32 or, if either is, float64. 0 is as the teacher, 1 as far as zeros are from it. A layer that did not
        run in either model is left out.

        Returns:
            A scalar: the mean over the layers, times `weight`. What was recorded is let go; `taught` stays until the
            model is called again. Of several calls before it, only the last counts.

        Raises:
            RuntimeError: the model was not called in training mode with gradients since the last `loss()`, or no layer
                ran then, or not as often, or with other shapes, as in the teacher; or after `remove()`.
            ValueError: there are no layers to compare.
        """
        call = self._call_to_compare()
        taught = self._taught_for(call)
        distances = []
        for name in self._layers:
            ours, theirs = (one.outputs.get(name, []) for one in (call, taught))
            _check_shapes(name, ours, theirs)
            if ours:
                distances.append(_distance(ours, theirs))
        if not distances:
            raise RuntimeError(f"none of the layers {listed(self._layers)} ran in the last call of the model")
        call.spend()
        return self.weight * torch.stack([distance.to(distances[0].device) for distance in distances]).mean()

    def remove(self) -> None:
        """Take the hooks off both models, and let go of them. A second call does nothing."""
        if self._model is not None:
            self._recorder.remove()
            self._teachers_recorder.remove()
            self._model = None
            del self._teacher

    def _call_to_compare(self) -> RecordedCall:
        self._check_alive()
        if not self._layers:
            raise ValueError("loss() has no layers to compare, for layers=(): it is for `taught` alone")
        call = self._recorder.last
        if call is not None and call.spent:
            raise RuntimeError(
                "loss() was computed already for the last call of the model in training mode: call it again before "
                "loss(), and leave loss() out in validation, as by `if model.training`"
            )
        if call is None and self._recorder.ran_outside:
            raise RuntimeError(
                "layers ran, but the model was not called itself before loss(): give Distillation the module that is "
                "called, such as self.net for self.net(x) in a training_step"
            )
        if call is None:
            raise RuntimeError(
                "call the model in training mode, with gradients, before loss(); leave loss() out in validation, as by "
                "`if model.training`"
            )
        return call

    def _taught_for(self, call: RecordedCall) -> RecordedCall:
        """The teacher's call for one of the model's: what the user called, or a new one."""
        last = None if call.spent else self._teachers_recorder.take()
        if last is not None and last.follows(call):
            call.taught = last
        if call.taught is None:
            with call.autocasting():
                self.teacher(*call.args, **call.kwargs)
            call.taught = self._teachers_recorder.take()
        assert call.taught is not None
        return call.taught

    def _follow(self) -> None:
        device, dtype = place_of(self._check_alive())
        if device is not None and device != place_of(self._teacher)[0]:
            self._teacher.to(device)
        if dtype != self._dtype:
            self._teacher.to(dtype)
            self._dtype = dtype

    def _check_alive(self) -> nn.Module:
        if self._model is None:
            raise RuntimeError(
                "this Distillation was removed, or is a copy, which belongs to no model: make one for the model"
            )
        return self._model

    def __enter__(self) -> Distillation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # hooks stay in the model that they were made for, and a checkpoint needs no teacher

    def __repr__(self) -> str:
        if self._model is None:
            return "Distillation(removed)"
        return f"Distillation({listed(self._layers) or 'no layers'}, weight={self.weight})"


def divergence(scores: Tensor, taught: Tensor, temperature: float = 2.0) -> Tensor:
    """Return the Kullback-Leibler divergence from a teacher's predictions of classes (Hinton, Vinyals & Dean 2015).

        T^2 KL(softmax(taught / T) || softmax(scores / T))

    T^2 keeps the size of the gradients, so that a weight chosen for one temperature is right for another.

    Args:
        scores: [..., classes], floating-point, before the softmax.
        taught: of the same shape, by the teacher; no gradient goes there.
        temperature: T, above 0; more of it gives unlikely classes a larger part.

    Returns:
        A scalar, the mean over all leading axes, in float32 or, if either is, float64. Where padding must not count,
        select first: `divergence(scores[mask], taught[mask])`. A class that both rule out by a score of -inf adds 0.

    Raises:
        TypeError, ValueError: a bad argument.

    >>> scores = torch.tensor([[1.0, 2.0, 3.0]])
    >>> divergence(scores, scores).item(), f"{divergence(scores, scores.flip(1), temperature=1.0).item():.4f}"
    (0.0, '1.1504')
    """
    for name, value in {"scores": scores, "taught": taught}.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if not value.is_floating_point():
            raise TypeError(f"{name} must be floating-point scores before the softmax, got {value.dtype}")
    if scores.shape != taught.shape or scores.dim() == 0:
        shapes = f"{tuple(scores.shape)} and {tuple(taught.shape)}"
        raise ValueError(f"scores and taught must be of one shape [..., classes], got {shapes}")
    temperature = _checked("temperature", temperature, "a number above 0", zero=False)
    dtype = _wide(scores, taught)
    ours, theirs = ((one.to(dtype) / temperature).log_softmax(-1) for one in (scores, taught.detach()))
    terms = theirs.exp() * (theirs - ours)
    return temperature**2 * terms.masked_fill(theirs == -math.inf, 0).sum(-1).mean()


def _check_shapes(name: str, ours: list[Tensor], theirs: list[Tensor]) -> None:
    named = name or "the model"
    if len(ours) != len(theirs):
        raise RuntimeError(
            f"{named} ran {len(ours)} times in the last call of the model, and {len(theirs)} times in the teacher's, "
            "which cannot be compared: leave it out by layers=, or let both go through the same steps"
        )
    for y, y_teacher in zip(ours, theirs, strict=True):
        if y.shape != y_teacher.shape:
            shapes = f"{tuple(y.shape)} in the model and {tuple(y_teacher.shape)} in the teacher"
            raise RuntimeError(f"{named} returned {shapes}: the teacher must be called with the same input")


def _distance(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """The sum of squared differences over that of squares of the teacher's, which may be zeros."""
    dtype = _wide(*ours, *theirs)
    device = ours[0].device
    difference, power = (torch.zeros((), dtype=dtype, device=device) for _ in range(2))
    for y, y_teacher in zip(ours, theirs, strict=True):
        target = y_teacher.to(device, dtype)
        difference = difference + (y.to(device, dtype) - target).square().sum()
        power = power + target.square().sum()
    count = sum(y.numel() for y in ours)
    return difference / power.clamp(min=torch.finfo(dtype).eps * max(1, count))


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _checked(name: str, value: object, wanted: str, *, zero: bool) -> float:
    """Return a finite number of 0 or more; without `zero`, above 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {wanted}, got {value!r}")
    number = float(value)
    if not (math.isfinite(number) and (number > 0 or (zero and number == 0))):
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return number
