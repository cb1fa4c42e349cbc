"""The flat list of tensors in which an operator takes the weights of a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

from torch import Tensor

from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.layer_config import GATES
from triton_sparse_rnn.sparse.layer_weights import LayerWeights

MATRICES, BIASES = ("weight_ih", "weight_hh", "weight_hr"), ("bias_ih", "bias_hh")
NAMES = (*(f"{matrix}_{part}" for matrix in MATRICES for part in BlockMatrix.PARTS), *BIASES)  # of one direction
T = TypeVar("T")

# A layer that a backend has prepared: (x, states, batch_sizes) -> [y, h_n(, c_n)], as `reference.recurrent_layer`.
RunLayer: TypeAlias = Callable[[Tensor, list[Tensor], "Tensor | None"], list[Tensor]]


def pack_layer_weights(directions: list[LayerWeights]) -> list[Tensor | None]:
    """Return a tensor for each of NAMES, direction after direction. The values of a dense weight are the weight."""
    packed = []
    for weights in directions:
        for name in MATRICES:
            matrix = getattr(weights, name)
            parts = matrix.parts() if isinstance(matrix, BlockMatrix) else {"values": matrix}
            packed += [parts.get(part) for part in BlockMatrix.PARTS]
        packed += [getattr(weights, name) for name in BIASES]
    return packed


def name_directions(packed: Sequence[T]) -> list[dict[str, T]]:
    """Return what stands in a list of `pack_layer_weights`, by NAMES, for each direction."""
    starts = range(0, len(packed), len(NAMES))
    return [dict(zip(NAMES, packed[start : start + len(NAMES)], strict=True)) for start in starts]


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
    shapes = {"weight_ih": (gates * H, input_size), "weight_hh": (gates * H, hidden), "weight_hr": (hidden, H)}

    def unpack(name: str, direction: dict[str, Tensor | None]) -> BlockMatrix | Tensor | None:
        parts = {part: direction[f"{name}_{part}"] for part in BlockMatrix.PARTS}
        if parts["columns"] is None:
            return parts["values"]
        return BlockMatrix.from_parts(parts, shape=shapes[name], gates=1 if name == "weight_hr" else gates)

    return [
        LayerWeights(
            **{name: unpack(name, direction) for name in MATRICES},  # type: ignore[arg-type]
            **{name: direction[name] for name in BIASES},
        )
        for direction in name_directions(tensors)
    ]


def plain(tensor: Tensor) -> Tensor:
    """As a kernel reads it from memory: contiguous, and without a minus sign that torch has put off."""
    return (tensor.resolve_neg() if tensor.is_neg() else tensor).contiguous()
