"""The operator of a recurrent layer, opaque to torch.compile, torch.export and autograd.

It is registered as torch.ops.triton_sparse_rnn.recurrent_layer when this package is imported.
"""

from collections.abc import Sequence
from typing import Optional  # the schema is read from these annotations, which spell Tensor? only this way

import torch
from torch import Tensor
from torch._C import _is_tracing, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from triton_sparse_rnn.ops.dispatch import BACKENDS, choose_backend
from triton_sparse_rnn.ops.layer_weights import (
    NAMES,
    RunLayer,
    StoredLayer,
    pack_layer_weights,
    unpack_layer_weights,
)
from triton_sparse_rnn.ops.validation import check_call, check_num_threads


# Unsafe in a CUDA graph of torch.compile: a first call, which prepares the layer, would run in the memory of the graph.
@torch.library.custom_op("triton_sparse_rnn::recurrent_layer", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def recurrent_layer(
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Optional[Tensor]],  # noqa: UP045
    batch_sizes: Optional[Tensor],  # noqa: UP045
    mode: str,
    hidden_size: int,
    backend: Optional[str],  # noqa: UP045
    activation_dtype: Optional[torch.dtype],  # noqa: UP045
    num_threads: int,
) -> list[Tensor]:
    """Run one layer, all its directions, over all steps.

    Args:
        x: [N, I], the rows of a packed batch (nn.utils.rnn.PackedSequence.data).
        states: h0 [D, B, H or proj_size] and, for an LSTM, c0 [D, B, H]; dtype of x.
        weights: the list of `pack_layer_weights`.
        batch_sizes: [T], int64 on the CPU (PackedSequence.batch_sizes); None for B rows at every step.
        mode: nn.RNNBase.mode.
        hidden_size: H.
        backend: one of `dispatch.BACKENDS`, or None for the fastest that fits.
        activation_dtype: torch.int8 for quantised activations (reference.py), which need weights in it; or None.
        num_threads: for the "cpu" backend.
    Returns:
        y [N, D * (H or proj_size)], h_n and, for an LSTM, c_n.
    Raises:
        ValueError, RuntimeError: arguments do not fit together.
        BackendUnavailableError: `backend` is named and cannot run this layer.
    """
    directions = unpack_layer_weights(weights, mode, x.shape[-1], (hidden_size, states[0].shape[-1]))
    num_threads = check_num_threads(num_threads)
    check_call(x, list(states), directions, batch_sizes, mode, activation_dtype)
    layer = StoredLayer(mode, directions, x.dtype, x.device, activation_dtype)
    return BACKENDS[choose_backend(backend, layer)].prepare_layer(layer, num_threads)(x, list(states), batch_sizes)


@recurrent_layer.register_fake
def _(x, states, weights, batch_sizes, mode, hidden_size, backend, activation_dtype, num_threads):
    directions = len(weights) // len(NAMES)
    return [x.new_empty(x.shape[0], directions * states[0].shape[2]), *(s.new_empty(s.shape) for s in states)]


@torch.library.custom_op("triton_sparse_rnn::refuse_backward", mutates_args=())
def refuse_backward(grads: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Stand for the gradients of `inputs`, and raise when they are computed.

    An operator of its own, so that a compiled or exported forward, which traces its backward too, still runs.
    """
    raise RuntimeError(
        "this layer was converted by to_sparse() and has no backward: it is for inference. "
        "Train the SparseRNN, SparseGRU, SparseLSTM or nn.Linear that it was made from, and convert again."
    )


@refuse_backward.register_fake
def _(grads, inputs):
    return [tensor.new_empty(tensor.shape) for tensor in inputs]


def _keep_inputs(ctx, inputs, output):
    x, states, *_ = inputs
    ctx.save_for_backward(x, *states)


def _backward(ctx, grads):
    grad_x, *grad_states = refuse_backward(grads, ctx.saved_tensors)
    return grad_x, grad_states, *[None] * 7  # of all other arguments


recurrent_layer.register_autograd(_backward, setup_context=_keep_inputs)


def refuse_tangents(tensors: list[Tensor]) -> None:
    """Raise in forward-mode AD, before the operator: there torch.func.jvp takes a missing rule for a zero tangent."""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(
            "this layer was converted by to_sparse() and has no derivatives, forward-mode ones neither: it is for "
            "inference. Differentiate the SparseRNN, SparseGRU, SparseLSTM or nn.Linear that it was made from."
        )


def traced_layer(layer: StoredLayer, hidden_size: int, *, backend: str | None, num_threads: int) -> RunLayer:
    """Return a layer that is one operator to whoever traces or differentiates the call; see `recurrent_layer`."""
    tensors = pack_layer_weights(layer.directions)

    def run_layer(x: Tensor, states: list[Tensor], batch_sizes: Tensor | None) -> list[Tensor]:
        refuse_tangents([x, *states])
        options = backend, layer.activation_dtype, num_threads
        return recurrent_layer(x, states, tensors, batch_sizes, layer.mode, hidden_size, *options)

    return run_layer


def is_observed(x: Tensor, states: list[Tensor]) -> bool:
    """Whether something traces this call, wants its gradient or only shapes: then it goes through the operator."""
    tensors = (x, *states)
    return (
        is_compiling()
        or is_watched()
        or any(type(tensor) is not Tensor or tensor.is_meta for tensor in tensors)
        or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    )


def is_watched() -> bool:
    """Whether something other than torch.compile watches what is done with tensors, whichever they are.

    Asked at every call, so written to be answered in a fifth of a microsecond.
    """
    return (
        _is_tracing()
        or peek_interpreter_stack() is not None  # vmap, jvp, torch.func.grad
        or forward_ad._current_level >= 0
        or _len_torch_dispatch_stack() > 0
    )
