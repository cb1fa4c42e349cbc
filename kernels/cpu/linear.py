"""W x + b for any number of rows, a window of them at a time, whatever the blocks and their dtype.

| tensor | shape              | dtype   |                                                               |
|--------|--------------------|---------|---------------------------------------------------------------|
| x      | [N, columns]       | float32 | read                                                          |
| y      | [N, rows]          | float32 | written                                                       |
| packed | [window, padded]   |         | scratch: inputs as a product reads them (pack.py)             |
| filled | [window, padded]   | float32 | scratch: outputs, where a row of y is no whole number of them |

x and y are contiguous. "Padded" is filled up to whole blocks, or to whole banks. Scratch ends with `filled`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from triton_sparse_rnn.kernels.cpu.intrinsics import allocate, close_over, copy_rows, load_tuple, release
from triton_sparse_rnn.kernels.cpu.matrix import MatrixFields
from triton_sparse_rnn.kernels.cpu.multiply import MATRIX_WORDS, multiply, pad_constants
from triton_sparse_rnn.kernels.cpu.vector_code import FLOAT_BYTES


class LinearFields(NamedTuple):
    """What holds for every call of a layer. Scratch is given as offsets in bytes."""

    matrix: int  # address of MatrixFields
    window: int  # rows at a time
    kernel: int
    packed_scales: int
    packed: int


_LINEAR_WORDS = len(LinearFields._fields)


def make_run_linear(fingerprint: str) -> Callable[..., bool]:
    """Return the function, for numba to compile; `fingerprint` as for `layer.make_run_layer`."""

    def run_linear(linear, team, N, x, y):
        """Multiply all rows; returns whether there was memory for it.

        `linear` is the address of LinearFields; `team` as for `run_kernel`; x and y are addresses.
        """
        close_over(fingerprint)
        fields = LinearFields(*load_tuple(linear, _LINEAR_WORDS))
        matrix = MatrixFields(*load_tuple(fields.matrix, MATRIX_WORDS))
        x_bytes, y_bytes, filled_bytes = FLOAT_BYTES * matrix.inputs, matrix.row_bytes, matrix.gate_bytes
        window = min(N, fields.window)
        offset = fields.packed + window * matrix.input_bytes + 63
        offset -= offset % 64
        memory = allocate(offset + window * filled_bytes + 64)
        if memory == 0:
            return False
        scratch = memory + 64 - memory % 64  # from the beginning of a cache line
        filled = scratch + offset
        pad_constants(scratch, fields.matrix)
        first = 0
        while first < N:
            rows = min(window, N - first)
            source, target = x + first * x_bytes, y + first * y_bytes
            if filled_bytes == y_bytes:
                multiply(team, scratch, fields, fields.matrix, rows, source, x_bytes, target, y_bytes)
            else:
                multiply(team, scratch, fields, fields.matrix, rows, source, x_bytes, filled, filled_bytes)
                copy_rows(rows, y_bytes, filled, filled_bytes, target, y_bytes)
            first += rows
        release(memory)
        return True

    return run_linear
