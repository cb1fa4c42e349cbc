"""Where the numbers of tensors begin in memory: the one way from a tensor to an address that a kernel is given.

A tensor that is not what a kernel takes it for would be read as something else, or past its end. So whoever prepares a
launch takes addresses here. Two launchers take them by themselves in a call, since it takes them longer than the step:
recurrent_layer.py those of x and of the states, which `ops/validation.check_call` or `nn.plan.Plan.plain_states` have
looked at by then, and of what it makes itself as they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from triton_sparse_rnn.sparse.block_matrix import BlockMatrix


def reached_bytes(tensor: Tensor) -> int:
    """Return how far into its storage a tensor that is not empty reaches."""
    if tensor.is_contiguous():
        numbers = tensor.numel()
    else:
        numbers = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (tensor.storage_offset() + numbers) * tensor.itemsize


def address_of(name: str, tensor: Tensor, dtype: torch.dtype, count: int) -> int:
    """Return the address of at least `count` numbers of a dtype, one behind the other, on the CPU.

    Raises:
        ValueError: the tensor is of another kind, or has fewer.
    """
    _check(name, tensor, dtype, count)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    return tensor.data_ptr()


def addresses_of_parts(matrix: BlockMatrix) -> dict[str, int]:
    """Return the addresses of the parts of a matrix by name, 0 for one that it does without.

    Raises:
        ValueError: a part is of another kind, or too short.
    """
    return dict.fromkeys(matrix.PARTS, 0) | {
        name: address_of(name, getattr(matrix, name), dtype, math.prod(shape))
        for name, (dtype, shape) in matrix.kinds().items()
    }


def address_of_rows(name: str, matrix: Tensor, rows: int, columns: int) -> int:
    """Return the address of a matrix of float32 with so many rows or more, and columns side by side, on the CPU.

    Raises:
        ValueError: the matrix is of another kind, or smaller.
    """
    _check(name, matrix, torch.float32, rows * columns)
    fits = matrix.dim() == 2 and matrix.shape[0] >= rows and matrix.shape[1] >= columns
    if not fits or (rows > 0 and columns > 1 and matrix.stride(1) != 1):
        raise ValueError(
            f"{name} must have {rows} rows of {columns} numbers side by side, got shape {tuple(matrix.shape)} and "
            f"strides {matrix.stride()}"
        )
    return matrix.data_ptr()


def _check(name: str, tensor: Tensor, dtype: torch.dtype, count: int) -> None:
    if not tensor.is_cpu or tensor.dtype != dtype or tensor.numel() < count:
        raise ValueError(
            f"{name} must be {count} numbers of {dtype} on the CPU, got {tensor.numel()} of {tensor.dtype} on "
            f"{tensor.device}"
        )
    if tensor.numel() and tensor.untyped_storage().nbytes() < reached_bytes(tensor):
        raise ValueError(f"{name} has no memory for its numbers: its storage was freed or cut")
