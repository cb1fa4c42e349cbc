"""A linear layer as backends take it, and the flat list of tensors in which an operator takes its weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from triton_sparse_rnn.sparse.block_matrix import BlockMatrix

# A linear layer that a backend has prepared: x [..., columns] -> W x + b [..., rows], as `reference.linear_layer`.
RunLinear: TypeAlias = Callable[[Tensor], Tensor]


class StoredLinear(NamedTuple):
    """A linear layer without its input: what a backend is asked for."""

    weight: BlockMatrix  # [rows, columns], one gate
    bias: Tensor | None  # [rows]
    dtype: torch.dtype  # of inputs and bias
    device: torch.device  # of all tensors
    activation_dtype: torch.dtype | None = None  # torch.int8 for activations that are quantised


def pack_matrix(weight: BlockMatrix) -> list[Tensor | None]:
    """Return a tensor for each of BlockMatrix.PARTS."""
    return list(weight.parts().values())


def unpack_matrix(tensors: Sequence[Tensor | None], shape: tuple[int, int]) -> BlockMatrix:
    """Undo `pack_matrix` for a matrix of one gate.

    Raises:
        ValueError: there are too few or too many tensors.
    """
    if len(tensors) != len(BlockMatrix.PARTS):
        raise ValueError(f"weight must be the tensors {', '.join(BlockMatrix.PARTS)}, got {len(tensors)} tensors")
    return BlockMatrix.from_parts(dict(zip(BlockMatrix.PARTS, tensors, strict=True)), shape=shape, gates=1)
