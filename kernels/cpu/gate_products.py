"""Products of gate gradients with matrices, three ways: with all numbers, of the rows that are not 0, without zeros.

    times(X)                 gates X               [N, 4 H] [4 H, I] -> [N, I]     the gradient of the input
    transposed_times(X, Y)   gates^T X, gates^T Y  [4 H, N] [N, I] -> [4 H, I]     those of the weights

Where a number of gates is left out because it is 0, infinity and NaN in what it would be multiplied by are too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from triton_sparse_rnn.kernels.cpu.compilation import kernel_address, kernel_function
from triton_sparse_rnn.kernels.cpu.dense_products import multiply
from triton_sparse_rnn.kernels.cpu.sparse_products import (
    PANEL_COLUMNS,
    FactorFields,
    PanelFields,
    PanelFormat,
    SparseProductFields,
    SparseProductFormat,
    lay_out_scratch,
    panels_bytes,
)

_FLOAT_BYTES, _LINE_BYTES = 4, 64


class Products(Protocol):
    """See the top of the file."""

    def times(self, matrix: Tensor) -> Tensor: ...

    def transposed_times(self, *inputs: Tensor) -> list[Tensor]: ...


class DenseProducts:
    """With all numbers of gates [N, 4 H]."""

    def __init__(self, gates: Tensor, *, keeps_shape: bool) -> None:
        """`keeps_shape` tells that N will be the same in many calls."""
        self._gates, self._keeps_shape = gates, keeps_shape

    def times(self, matrix: Tensor) -> Tensor:
        return multiply(self._gates, matrix) if self._keeps_shape else self._gates @ matrix

    def transposed_times(self, *inputs: Tensor) -> list[Tensor]:
        return [self._gates.t() @ each for each in inputs]


class RowProducts:
    """Of some rows of gates [N, 4 H], while the others are 0."""

    def __init__(self, gates: Tensor, kept: Tensor) -> None:
        """`kept` has the numbers of these rows."""
        self._N, self._kept, self._gates = gates.shape[0], kept, gates.index_select(0, kept)

    def times(self, matrix: Tensor) -> Tensor:
        return matrix.new_zeros(self._N, matrix.shape[1]).index_copy_(0, self._kept, self._gates @ matrix)

    def transposed_times(self, *inputs: Tensor) -> list[Tensor]:
        return [self._gates.t() @ each.index_select(0, self._kept) for each in inputs]


class SkippingProducts:
    """Without the zeros of gates [N, 4 H], each of them."""

    def __init__(self, gates: Tensor) -> None:
        self._gates = gates

    def times(self, matrix: Tensor) -> Tensor:
        output = matrix.new_empty(self._gates.shape[0], matrix.shape[1])
        SkippingProduct(self._gates, len(output), [(matrix, output)])(len(output))
        return output

    def transposed_times(self, *inputs: Tensor) -> list[Tensor]:
        if not inputs:
            return []
        N, columns = self._gates.shape
        outputs = [each.new_empty(columns, each.shape[1]) for each in inputs]
        SkippingProduct(self._gates, N, [*zip(inputs, outputs, strict=True)], transposed=True)(N)
        return outputs


class SkippingProduct:
    """A kernel of sparse_products.py that is ready to run: it writes gates X, or gates^T X, for one X or several.

    Attributes:
        kernel, fields: addresses, for compiled code that calls it itself.
    """

    def __init__(
        self, gates: Tensor, rows: int, factors: Sequence[tuple[Tensor, Tensor]], *, transposed: bool = False
    ) -> None:
        """Lay out each X.

        Args:
            gates: [N, 4 H].
            rows: of gates, the most that a call takes.
            factors: each X and where its product is written.
            transposed: whether gates are.
        """
        kernel = SparseProductFormat(by_columns=transposed)
        panels = [_panels(matrix) for matrix, _ in factors]
        factor_words = np.array(
            [
                FactorFields(place.address, place.bytes, output.shape[1], output.data_ptr(), _row_bytes(output))
                for place, (_, output) in zip(panels, factors, strict=True)
            ],
            dtype=np.int64,
        )
        offsets, scratch_bytes = lay_out_scratch(transposed, rows, gates.shape[1])
        scratch, address = _aligned(scratch_bytes)
        starts, values, places, sums = (address + offset for offset in offsets)
        fields = SparseProductFields(
            gates.data_ptr(), _row_bytes(gates), gates.shape[1], starts, values, places, sums,
            factor_words.ctypes.data, len(factors),
        )  # fmt: skip
        self._words = np.array(fields, dtype=np.int64)
        self._read = (gates, factors, panels, factor_words, scratch)  # these must stay where they are
        self._run = kernel_function(kernel)
        self.kernel, self.fields = kernel_address(kernel), self._words.ctypes.data

    def __call__(self, rows: int) -> None:
        """Multiply the first `rows` rows of gates."""
        self._run(self.fields, 0, rows)


class _Panels(NamedTuple):
    memory: np.ndarray
    address: int
    bytes: int  # of one


def _panels(matrix: Tensor) -> _Panels:
    """Lay out a matrix as sparse_products.py reads it."""
    rows, columns = matrix.shape
    memory, address = _aligned(panels_bytes(rows, columns))
    count = -(-columns // PANEL_COLUMNS)
    bytes_of_one = panels_bytes(rows, 1)
    fields = PanelFields(matrix.data_ptr(), _row_bytes(matrix), rows, columns, address, bytes_of_one)
    words = np.array(fields, dtype=np.int64)
    kernel_function(PanelFormat())(words.ctypes.data, 0, count)
    return _Panels(memory, address, bytes_of_one)


def _aligned(size: int) -> tuple[np.ndarray, int]:
    """New memory, and where in it so many bytes begin that lie in cache lines of their own."""
    memory = np.empty(size + _LINE_BYTES, dtype=np.uint8)
    return memory, -(-memory.ctypes.data // _LINE_BYTES) * _LINE_BYTES


def _row_bytes(matrix: Tensor) -> int:
    return matrix.stride(0) * _FLOAT_BYTES
