"""The weights of one direction of one layer, and the flat list of tensors in which an operator takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor

from triton_sparse_rnn.sparse.block_matrix import GATES, BlockMatrix
from triton_sparse_rnn.sparse.layer_weights import LayerWeights

TENSORS_PER_MATRIX = 4
TENSORS_PER_DIRECTION = 3 * TENSORS_PER_MATRIX + 2

# A layer that a backend has prepared: (x, states, batch_sizes) -> [y, h_n(, c_n)], as `reference.recurrent_layer`.
RunLayer: TypeAlias = Callable[[Tensor, list[Tensor], "Tensor | None"], list[Tensor]]


def pack_layer_weights(weights: LayerWeights) -> list[Tensor | None]:
    """Return the tensors of one direction, TENSORS_PER_DIRECTION of them, for `unpack_layer_weights`.

    Four for each of weight_ih, weight_hh and weight_hr, then the biases. A dense weight is the first of its four.
    """
    matrices = (weights.weight_ih, weights.weight_hh, weights.weight_hr)
    return [*(part for matrix in matrices for part in _pack(matrix)), weights.bias_ih, weights.bias_hh]


def unpack_layer_weights(
    tensors: Sequence[Tensor | None], mode: str, input_size: int, sizes: tuple[int, int]
) -> list[LayerWeights]:
    """Undo `pack_layer_weights` for every direction in the list.

    Args:
        tensors: D * TENSORS_PER_DIRECTION tensors, direction after direction.
        mode: nn.RNNBase.mode, which tells the number of gates.
        input_size: columns of the input weight.
        sizes: (H, columns of the recurrent weight).
    """
    gates, (H, hidden) = GATES[mode], sizes
    directions = []
    for first in range(0, len(tensors), TENSORS_PER_DIRECTION):
        *parts, bias_ih, bias_hh = tensors[first : first + TENSORS_PER_DIRECTION]
        ih, hh, hr = (parts[i : i + TENSORS_PER_MATRIX] for i in range(0, len(parts), TENSORS_PER_MATRIX))
        directions.append(
            LayerWeights(
                _unpack(ih, (gates * H, input_size), gates),  # type: ignore[arg-type]
                _unpack(hh, (gates * H, hidden), gates),  # type: ignore[arg-type]
                bias_ih,
                bias_hh,
                _unpack(hr, (hidden, H), 1),  # type: ignore[arg-type]
            )
        )
    return directions


def plain(tensor: Tensor) -> Tensor:
    """As a kernel reads it from memory: contiguous, and without a minus sign that torch has put off."""
    return (tensor.resolve_neg() if tensor.is_neg() else tensor).contiguous()


def _pack(matrix: BlockMatrix | Tensor | None) -> list[Tensor | None]:
    if isinstance(matrix, BlockMatrix):
        return [matrix.values, matrix.columns, matrix.starts, matrix.scales]
    return [matrix, None, None, None]


def _unpack(parts: Sequence[Tensor | None], shape: tuple[int, int], gates: int) -> BlockMatrix | Tensor | None:
    values, columns, starts, scales = parts
    if columns is None:
        return values
    return BlockMatrix(values, columns, starts, shape, gates, scales)  # type: ignore[arg-type]
