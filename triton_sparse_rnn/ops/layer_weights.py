"""The weights of one direction of one layer, and the flat list of tensors in which an operator takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from triton_sparse_rnn.sparse.block_matrix import BlockMatrix

GATES = {"RNN_TANH": 1, "RNN_RELU": 1, "GRU": 3, "LSTM": 4}  # by nn.RNNBase.mode
TENSORS_PER_MATRIX = 4
TENSORS_PER_DIRECTION = 2 * TENSORS_PER_MATRIX + 3


class LayerWeights(NamedTuple):
    """What nn calls weight_ih_l{k}, weight_hh_l{k}, bias_ih_l{k}, bias_hh_l{k} and weight_hr_l{k}.

    The matrices are [G * H, input] and [G * H, H or proj_size] in blocks; biases [G * H] and weight_hr
    [proj_size, H] are ordinary tensors, None where the layer has none.
    """

    weight_ih: BlockMatrix
    weight_hh: BlockMatrix
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    weight_hr: Tensor | None = None


def pack_layer_weights(weights: LayerWeights) -> list[Tensor | None]:
    """Return the tensors of one direction, TENSORS_PER_DIRECTION of them, for `unpack_layer_weights`."""
    matrices = (weights.weight_ih, weights.weight_hh)
    parts = [part for matrix in matrices for part in (matrix.values, matrix.columns, matrix.starts, matrix.scales)]
    return [*parts, weights.bias_ih, weights.bias_hh, weights.weight_hr]


def unpack_layer_weights(tensors: Sequence[Tensor | None], mode: str, input_size: int, sizes: tuple[int, int]):
    """Undo `pack_layer_weights` for every direction in the list.

    Args:
        tensors: D * TENSORS_PER_DIRECTION tensors, direction after direction.
        mode: nn.RNNBase.mode, which tells the number of gates.
        input_size: columns of the input weight.
        sizes: (H, columns of the recurrent weight).
    """
    gates, (H, hidden_columns) = GATES[mode], sizes
    directions = []
    for first in range(0, len(tensors), TENSORS_PER_DIRECTION):
        ih, hh = (
            BlockMatrix(values, columns, starts, (gates * H, width), gates, scales)  # type: ignore[arg-type]
            for (values, columns, starts, scales), width in (
                (tensors[first : first + TENSORS_PER_MATRIX], input_size),
                (tensors[first + TENSORS_PER_MATRIX : first + 2 * TENSORS_PER_MATRIX], hidden_columns),
            )
        )
        directions.append(
            LayerWeights(ih, hh, *tensors[first + 2 * TENSORS_PER_MATRIX : first + TENSORS_PER_DIRECTION])
        )
    return directions
