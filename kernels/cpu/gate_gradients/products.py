"""Products of gate gradients with matrices, two ways: with all numbers, and without zeros.

    times(X)                 gates X               [N, 4 H] [4 H, I] -> [N, I]     the gradient of the input
    transposed_times(X, Y)   gates^T X, gates^T Y  [4 H, N] [N, I] -> [4 H, I]     those of the weights

Where a number of gates is left out because it is 0, infinity and NaN in what it would be multiplied by are too.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from triton_sparse_rnn.kernels.cpu.addresses import address_of_rows
from triton_sparse_rnn.kernels.cpu.compilation import kernel_address
from triton_sparse_rnn.kernels.cpu.gate_gradients.dense_products import multiply_dense
from triton_sparse_rnn.kernels.cpu.gate_gradients.sparse_products import (
    PANEL_COLUMNS,
    FactorFields,
    PanelFields,
    PanelFormat,
    SparseProductFields,
    SparseProductFormat,
    lay_out_scratch,
    panels_bytes,
)
from triton_sparse_rnn.kernels.cpu.threads import run_calls
from triton_sparse_rnn.kernels.cpu.vector_code import FLOAT_BYTES

_LINE_BYTES, _LINE_FLOATS = 64, 16
_THREAD_TERMS = 1 << 26  # of a product, zeros among them, for each thread: half a millisecond at 80 % zeros


class DenseProducts:
    """With all numbers of gates [N, 4 H]."""

    def __init__(self, gates: Tensor, *, keeps_shape: bool) -> None:
        """`keeps_shape` tells that N will be the same in many calls."""
        self._gates, self._keeps_shape = gates, keeps_shape

    def times(self, matrix: Tensor) -> Tensor:
        return multiply_dense(self._gates, matrix) if self._keeps_shape else self._gates @ matrix

    def transposed_times(self, *inputs: Tensor) -> list[Tensor]:
        return [self._gates.t() @ each for each in inputs]


class SkippingProducts:
    """Without the zeros of gates [N, 4 H], each of them; the same bits with any number of threads."""

    def __init__(self, gates: Tensor, num_threads: int = 1) -> None:
        """`num_threads` is the most that work on a product, the calling one among them."""
        self._gates, self._num_threads = gates, num_threads

    def times(self, matrix: Tensor) -> Tensor:
        output = matrix.new_empty(self._gates.shape[0], matrix.shape[1])
        threads = self.threads_for(matrix.shape[1])
        panels = lay_out([matrix], threads)
        parts = [
            SkippingProduct(self._gates[rows], len(output[rows]), panels, [output[rows]])
            for rows in _divide(len(output), threads)
        ]
        run_calls([part.call for part in parts], threads)
        return output

    def transposed_times(self, *inputs: Tensor) -> list[Tensor]:
        if not inputs:
            return []
        N, columns = self._gates.shape
        outputs = [each.new_empty(columns, each.shape[1]) for each in inputs]
        threads = self.threads_for(sum(each.shape[1] for each in inputs))
        panels = lay_out(inputs, threads)
        parts = [
            SkippingProduct(self._gates[:, rows], N, panels, [output[rows] for output in outputs], transposed=True)
            for rows in _divide(columns, threads)
        ]
        run_calls([part.call for part in parts], threads)
        return outputs

    def threads_for(self, columns: int) -> int:
        """How many work on a product whose factors have so many columns in all."""
        return max(1, min(self._num_threads, self._gates.numel() * columns // _THREAD_TERMS))


class SkippingProduct:
    """A kernel of sparse_products.py that is ready to run: it writes gates X, or gates^T X, for one X or several.

    Attributes:
        kernel, fields: addresses, for compiled code that calls it itself.
        call: what `threads.run_calls` takes, for all rows.
    """

    def __init__(
        self, gates: Tensor, rows: int, panels: Sequence[Panels], outputs: Sequence[Tensor], *, transposed: bool = False
    ) -> None:
        """Take over the tensors.

        Args:
            gates: [N, 4 H].
            rows: of gates, the most that a call takes.
            panels: each X.
            outputs: where each product is written.
            transposed: whether gates are.
        """
        factor_words = np.array(
            [
                FactorFields(
                    place.address,
                    place.bytes,
                    output.shape[1],
                    address_of_rows("output", output, *output.shape),
                    row_bytes(output),
                )
                for place, output in zip(panels, outputs, strict=True)
            ],
            dtype=np.int64,
        )
        offsets, scratch_bytes = lay_out_scratch(transposed, rows, gates.shape[1])
        scratch, address = _aligned(scratch_bytes)
        starts, values, places, sums = (address + offset for offset in offsets)
        fields = SparseProductFields(
            address_of_rows("gates", gates, *gates.shape), row_bytes(gates), gates.shape[1],
            starts, values, places, sums,
            factor_words.ctypes.data, len(outputs),
        )  # fmt: skip
        self._words = np.array(fields, dtype=np.int64)
        self._read = (gates, panels, outputs, factor_words, scratch)  # these must stay where they are
        self.kernel, self.fields = kernel_address(SparseProductFormat(by_columns=transposed)), self._words.ctypes.data
        self.call = self.kernel, self.fields, 0, rows


class Panels(NamedTuple):
    """A matrix as sparse_products.py reads it."""

    memory: np.ndarray
    address: int
    bytes: int  # of one


def lay_out(matrices: Sequence[Tensor], num_threads: int = 1) -> list[Panels]:
    """Copy matrices into panels, on at most so many threads."""
    kernel = kernel_address(PanelFormat())
    laid_out, words, calls = [], [], []
    for matrix in matrices:
        rows, columns = matrix.shape
        panels = Panels(*_aligned(panels_bytes(rows, columns)), panels_bytes(rows, 1))
        fields = PanelFields(
            address_of_rows("matrix", matrix, *matrix.shape),
            row_bytes(matrix),
            rows,
            columns,
            panels.address,
            panels.bytes,
        )
        laid_out.append(panels)
        words.append(np.array(fields, dtype=np.int64))
        calls += [(kernel, words[-1].ctypes.data, i, i + 1) for i in range(-(-columns // PANEL_COLUMNS))]
    run_calls(calls, num_threads)
    return laid_out


def _divide(count: int, parts: int) -> list[slice]:
    """Divide rows or columns into at most so many parts, at the beginnings of cache lines."""
    lines = -(-count // _LINE_FLOATS)
    parts = max(1, min(parts, lines))
    bounds = [min(count, lines * i // parts * _LINE_FLOATS) for i in range(parts + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def _aligned(size: int) -> tuple[np.ndarray, int]:
    """New memory, and where in it so many bytes begin that lie in cache lines of their own."""
    memory = np.empty(size + _LINE_BYTES, dtype=np.uint8)
    return memory, -(-memory.ctypes.data // _LINE_BYTES) * _LINE_BYTES


def row_bytes(matrix: Tensor) -> int:
    """The distance of rows in memory."""
    return matrix.stride(0) * FLOAT_BYTES
