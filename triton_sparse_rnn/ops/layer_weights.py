"""A layer as backends take it, and the flat list of tensors in which an operator takes its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.layer_config import GATES
from triton_sparse_rnn.sparse.layer_weights import LayerWeights

MATRICES = ("weight_ih", "weight_hh", "weight_hr")
NAMES = (*(f"{matrix}_{part}" for matrix in MATRICES for part in BlockMatrix.PARTS), "bias_ih", "bias_hh")
_NO_PARTS: dict[str, Tensor | None] = dict.fromkeys(BlockMatrix.PARTS)

# A layer that a backend has prepared: (x, states, batch_sizes) -> [y, h_n(, c_n)], as `reference.recurrent_layer`.
RunLayer: TypeAlias = Callable[[Tensor, list[Tensor], "Tensor | None"], list[Tensor]]


class StoredLayer(NamedTuple):
    """A layer without its inputs: what a backend is asked for."""

    mode: str  # nn.RNNBase.mode
    directions: list[LayerWeights]
    dtype: torch.dtype  # of inputs and biases
    device: torch.device  # of all tensors
    activation_dtype: torch.dtype | None = None  # torch.int8 for activations that are quantised


def pack_layer_weights(directions: list[LayerWeights]) -> list[Tensor | None]:
    """Return a tensor for each of NAMES, direction after direction. The values of a dense weight are the weight."""
    packed: list[Tensor | None] = []
    for weights in directions:
        for name in MATRICES:
            matrix = getattr(weights, name)
            parts = matrix.parts() if isinstance(matrix, BlockMatrix) else _NO_PARTS | {"values": matrix}
            packed += parts.values()
        packed += weights.bias_ih, weights.bias_hh
    return packed


def unpack_layer_weights(
    tensors: Sequence[Tensor | None], mode: str, input_size: int, sizes: tuple[int, int]
) -> list[LayerWeights]:
    """Undo `pack_layer_weights`.

    Args:
        tensors: what that returned.
        mode: nn.RNNBase.mode, which tells the number of gates.
        input_size: columns of the input weight.
        sizes: (H, columns of the recurrent weight).
    """
    gates, (H, hidden) = GATES[mode], sizes
    rest = iter(tensors)

    def unpack(rows: int, columns: int, gates: int) -> Any:
        parts = dict(zip(_NO_PARTS, rest))  # noqa: B905 - the rest is not of this matrix
        if parts["columns"] is None:
            return parts["values"]
        return BlockMatrix.from_parts(parts, shape=(rows, columns), gates=gates)

    directions = []
    for _ in range(len(tensors) // len(NAMES)):
        ih, hh, hr = unpack(gates * H, input_size, gates), unpack(gates * H, hidden, gates), unpack(hidden, H, 1)
        directions.append(LayerWeights(ih, hh, next(rest), next(rest), hr))
    return directions


def plain(tensor: Tensor) -> Tensor:
    """As a kernel reads it from memory: contiguous, and without a minus sign that torch has put off."""
    return (tensor.resolve_neg() if tensor.is_neg() else tensor).contiguous()
