"""One recurrent layer for autograd: torch's own forward, and a backward in which gate gradients become zero."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import Function

from triton_sparse_rnn.gate_gradients.contract import Arriving, BackwardDirection, Control, Gradients, Needed, Steps
from triton_sparse_rnn.gate_gradients.dispatch import choose_backward
from triton_sparse_rnn.gate_gradients.forward import Weights, run_forward
from triton_sparse_rnn.ops.validation import check_memory

_WEIGHT_GRADIENTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")  # of Gradients, in Weights' order
_PER_DIRECTION = len(_WEIGHT_GRADIENTS)


def run_layer(
    control: Control,
    first_index: int,
    mode: Literal["LSTM", "GRU"],
    x: Tensor,
    batch_sizes: tuple[int, ...],
    packed: bool,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run one layer, all its directions, so that its backward does as `control` says.

    Results are those of nn.LSTM or nn.GRU. All tensors share a dtype and a device. Forward runs under the caller's
    autocast, for with float32 on a CPU nn.GRU's products are affected by it; backward runs without. Gradients cannot be
    differentiated again: that raises RuntimeError.

    Args:
        control: asked at every backward, once for each direction.
        first_index: number of the layer's first direction, in nn.RNNBase's order.
        mode: nn.RNNBase.mode.
        x: [N, I], the rows of a packed batch: those of step t are batch_sizes[t] consecutive rows.
        batch_sizes: B_t of every step, at least one, never increasing.
        packed: whether x comes from a PackedSequence. If not, all B_t are equal.
        h0, c0: [D, B, R] and, for an LSTM, [D, B, H].
        weights: of each direction: w_ih [G H, I], w_hh [G H, R], b_ih and b_hh [G H] or None, w_hr [R, H] or None.
    Returns:
        y [N, D R], h_n [D, B, R] and, for an LSTM, c_n [D, B, H], else None.
    """
    layer = _Layer(control, first_index, mode, batch_sizes, packed)
    outputs: Any = _RunLayer.apply(layer, x, h0, c0, *(weight for one in weights for weight in one))
    return outputs[0], outputs[1], outputs[2]


@dataclasses.dataclass(frozen=True, eq=False)
class _Layer:
    """What a call is besides its tensors."""

    control: Control
    first_index: int
    mode: Literal["LSTM", "GRU"]
    batch_sizes: tuple[int, ...]
    packed: bool


class _RunLayer(Function):
    """(layer, x, h0, c0, weights...) -> y, h_n, c_n, and a workspace for each direction."""

    @staticmethod
    def forward(layer: _Layer, x: Tensor, h0: Tensor, c0: Tensor | None, *weights: Any) -> tuple[Tensor | None, ...]:
        directions = [Weights(*one) for one in _per_direction(weights)]
        y, h_n, c_n, workspaces = run_forward(x, layer.batch_sizes, layer.packed, h0, c0, directions)
        return y, h_n, c_n, *workspaces

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        layer, *tensors = inputs
        y, _, _, *workspaces = output
        ctx.layer = layer
        ctx.set_materialize_grads(False)  # there would be zeros for the workspaces too
        ctx.mark_non_differentiable(*(workspace for workspace in workspaces if workspace is not None))
        ctx.save_for_backward(*tensors, y, *workspaces)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if any(grad is not None and is_legacy_batchedtensor(grad) for grad in grads):
            _refuse("take many gradients at once (is_grads_batched, vectorize)")
        # A function of its own meets plain tensors under torch.func too, and can say that it has no derivative.
        return _Backward.apply(ctx.layer, ctx.needs_input_grad, *grads[:3], *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        _refuse("run under torch.vmap")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        _refuse("be differentiated in forward mode")


class _Backward(Function):
    """(layer, needs, gradients of y, h_n, c_n, what _RunLayer saved...) -> the gradients of _RunLayer's inputs."""

    @staticmethod
    def forward(layer: _Layer, needs: Sequence[bool], grad_y: Any, grad_h: Any, grad_c: Any, *saved: Any) -> Any:
        x, h0, c0, *rest = saved
        D, _, R = h0.shape
        weights, (y, *workspaces) = _per_direction(rest[: D * _PER_DIRECTION]), rest[D * _PER_DIRECTION :]
        needs_x, _, _, *needs_weights = needs[1:]
        arrived = [
            torch.zeros_like(like) if grad is None and like is not None else grad
            for grad, like in ((grad_y, y), (grad_h, h0), (grad_c, c0))
        ]
        gradients = []
        with torch.autocast(x.device.type, enabled=False):
            for d, needs_of in enumerate(_per_direction(needs_weights)):
                states = _part_of((y, h0, c0), d, R)
                tensors = _as_plain((x, *states, *weights[d]))
                direction = BackwardDirection(
                    layer.mode, Steps(layer.batch_sizes, d == 1), *tensors, workspace=workspaces[d]
                )
                arriving = Arriving(*_as_plain(_part_of(arrived, d, R)))
                needed = Needed(needs_x, needs_of[0], needs_of[1], needs_of[2] or needs_of[3], needs_of[4])
                gradients.append(_direction_gradients(layer, d, direction, arriving, needed))
            return None, *_joined(gradients, needs[1:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        _refuse("be differentiated twice")

    vmap = _RunLayer.vmap
    jvp = _RunLayer.jvp


def _part_of(states: Sequence[Any], d: int, R: int) -> tuple[Any, ...]:
    """Take those of a direction out of y [N, D R], h [D, B, R] and c [D, B, H] or None, or out of their gradients."""
    y, h, c = states
    return y[:, d * R : d * R + R], h[d], None if c is None else c[d]


def _as_plain(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Return the tensors as kernels read them: numbers in memory as they are, those of the last axis side by side."""
    return [tensor if tensor is None else _as_plain_tensor(tensor) for tensor in tensors]


def _as_plain_tensor(tensor: Tensor) -> Tensor:
    if tensor._is_zerotensor():  # has no memory
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    check_memory("a tensor that backward needs", tensor)
    tensor = tensor.resolve_neg()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _direction_gradients(
    layer: _Layer, d: int, direction: BackwardDirection, arriving: Arriving, needed: Needed
) -> Gradients:
    """Go back through one direction, as the control decides."""
    control, index = layer.control, layer.first_index + d
    decision = control.begin(index, direction, arriving)
    backend = choose_backward(control.backend, direction, decision.rule)
    gradients = backend.direction_gradients(direction, arriving, needed, decision)
    control.finish(index, direction, needed, decision, gradients)
    return gradients


def _joined(directions: list[Gradients], needs: Sequence[bool]) -> list[Tensor | None]:
    """Make one list of the gradients of all directions, in the order of _RunLayer's tensors."""

    def each(name: str) -> list[Tensor]:
        return [getattr(one, name) for one in directions]

    x = functools.reduce(torch.add, each("x")) if needs[0] else None
    h0, c0 = (torch.stack(each(name)) if need else None for name, need in zip(("h0", "c0"), needs[1:3], strict=True))
    weights = [getattr(one, name) for one in directions for name in _WEIGHT_GRADIENTS]
    return [x, h0, c0, *(weight if need else None for weight, need in zip(weights, needs[3:], strict=True))]


def _per_direction(tensors: Sequence[Any]) -> list[Sequence[Any]]:
    return [tensors[first : first + _PER_DIRECTION] for first in range(0, len(tensors), _PER_DIRECTION)]


def _refuse(what: str) -> NoReturn:
    raise RuntimeError(
        f"a layer with a gate_gradient cannot {what}: set its gate_gradient to None, and it is the layer of torch.nn."
    )
