"""The operator of a linear layer, opaque to torch.compile, torch.export and autograd.

It is registered as torch.ops.triton_sparse_rnn.linear when this package is imported.
"""

from collections.abc import Sequence
from typing import Optional  # the schema is read from these annotations, which spell Tensor? only this way

import torch
from torch import Tensor

from triton_sparse_rnn.ops.dispatch import BACKENDS, choose_linear_backend
from triton_sparse_rnn.ops.operators import refuse_backward, refuse_tangents
from triton_sparse_rnn.ops.stored_linear import RunLinear, StoredLinear, pack_matrix, unpack_matrix
from triton_sparse_rnn.ops.validation import check_linear, check_memory, check_num_threads


# Unsafe in a CUDA graph of torch.compile, as `recurrent_layer` is.
@torch.library.custom_op("triton_sparse_rnn::linear", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def linear(
    x: Tensor,
    weight: Sequence[Optional[Tensor]],  # noqa: UP045
    bias: Optional[Tensor],  # noqa: UP045
    out_features: int,
    backend: Optional[str],  # noqa: UP045
    activation_dtype: Optional[torch.dtype],  # noqa: UP045
    num_threads: int,
) -> Tensor:
    """Multiply rows by a stored weight, and add a bias.

    Args:
        x: [N, columns].
        weight: the list of `pack_matrix`.
        bias: [out_features], dtype of x; or None.
        out_features: rows of the weight.
        backend: one of `dispatch.BACKENDS`, or None for the fastest that fits.
        activation_dtype: torch.int8 for quantised activations (reference.py), which need a weight in it; or None.
        num_threads: for the "cpu" backend.
    Returns:
        y [N, out_features], dtype of x.
    Raises:
        ValueError, RuntimeError: arguments do not fit together.
        BackendUnavailableError: `backend` is named and cannot run this layer.
    """
    if x.dim() != 2:
        raise ValueError(f"x must be [N, columns], got {tuple(x.shape)}")
    check_memory("x", x)
    num_threads = check_num_threads(num_threads)
    matrix = unpack_matrix(weight, (out_features, x.shape[1]))
    layer = StoredLinear(matrix, bias, x.dtype, x.device, activation_dtype)
    check_linear(layer, indices=False)
    return BACKENDS[choose_linear_backend(backend, layer)].prepare_linear(layer, num_threads)(x)


@linear.register_fake
def _(x, weight, bias, out_features, backend, activation_dtype, num_threads):
    return x.new_empty(x.shape[0], out_features)


def _keep_input(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def _backward(ctx, grad):
    (grad_x,) = refuse_backward([grad], ctx.saved_tensors)
    return grad_x, *[None] * 6  # of all other arguments


linear.register_autograd(_backward, setup_context=_keep_input)


def traced_linear(layer: StoredLinear, *, backend: str | None, num_threads: int) -> RunLinear:
    """Return a layer that is one operator to whoever traces or differentiates the call; see `linear`."""
    tensors, (rows, columns) = pack_matrix(layer.weight), layer.weight.shape

    def run_linear(x: Tensor) -> Tensor:
        refuse_tangents([x])
        options = backend, layer.activation_dtype, num_threads
        y = linear(x.reshape(-1, columns), tensors, layer.bias, rows, *options)
        return y.view(*x.shape[:-1], rows)

    return run_linear
