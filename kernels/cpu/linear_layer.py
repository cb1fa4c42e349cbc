"""The launcher: a linear layer with addresses in place of tensors.

| tensor | shape                         | dtype      |                |
|--------|-------------------------------|------------|----------------|
| weight | a BlockMatrix [rows, columns] | support.py | read; one gate |
| bias   | [rows]                        | float32    | read           |
| x      | [..., columns]                | float32    | read           |
| y      | [..., rows]                   | float32    | written        |

All are contiguous.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from triton_sparse_rnn.kernels.cpu.compilation import compiled_linear, kernel_address
from triton_sparse_rnn.kernels.cpu.linear import LinearFields
from triton_sparse_rnn.kernels.cpu.matrix import format_of, matrix_fields, padded_rows
from triton_sparse_rnn.kernels.cpu.multiply import KERNEL_BYTES
from triton_sparse_rnn.kernels.cpu.pack import PackFormat
from triton_sparse_rnn.kernels.cpu.pick_words import pick_words
from triton_sparse_rnn.kernels.cpu.threads import Team
from triton_sparse_rnn.kernels.cpu.vector_code import FLOAT_BYTES
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix

_WINDOW_BYTES = 1 << 18  # of packed inputs or of outputs: read again while they are in the second-level cache
_TILE = 8  # rows, the most that share each load of a weight
_SHARED_BYTES = 1 << 23  # of weights, as often as they are multiplied, from which on a call for help pays
_LINE_BYTES = 64


class LinearLayer:
    """A linear layer ready to run: its kernels are compiled, and the addresses of its tensors are taken.

    As of a `RecurrentLayer`, weights are looked at when it is made, but not what indices hold: `BlockMatrix.check` does
    that; what it is called with is not looked at; and the tensors must stay where they are as long as this is called.
    """

    def __init__(self, weight: BlockMatrix, bias: Tensor | None, *, quantized: bool, num_threads: int = 1) -> None:
        """Compile what has not been compiled yet.

        Args:
            weight: of one gate; `unreadable_reason` (support.py) must have returned None for it.
            bias: or None.
            quantized: whether x is quantised, for weights in int8.
            num_threads: the most that work on a call, the calling one among them.
        """
        layout = format_of(weight, quantized)
        like = {"dtype": torch.float32, "device": "cpu"}
        self._tensors = weight, torch.zeros(padded_rows(weight), **like) if bias is None else bias
        self._matrix = matrix_fields(
            *self._tensors,
            layout,
            pack=kernel_address(PackFormat.for_product(layout)),
            product=kernel_address(layout),
        )
        if layout.reads_words:
            self._words = pick_words(weight)
            self._matrix = self._matrix._replace(**self._words.addresses())
        self._record = np.array(self._matrix, dtype=np.int64)
        self._rows = weight.shape[0]
        self._nbytes = weight.nbytes
        self._num_threads = num_threads
        fields = np.array(self._place(), dtype=np.int64)
        self._fields, self._address = fields, fields.ctypes.data
        self._run = compiled_linear()
        if num_threads > 1:
            Team.compile()

    def __call__(self, x: Tensor) -> Tensor:
        """Return y [..., rows] of x [..., columns]."""
        # Of a single row most of the time is spent here: no line is without its price.
        shape = x.shape[:-1]
        N = shape.numel()
        y = x.new_empty((*shape, self._rows))
        if N == 0:
            return y
        source = x.data_ptr()
        if source == 0 and x.numel() > 0:
            raise RuntimeError("x must have memory, got a tensor whose memory was freed")
        if self._num_threads > 1 and N * self._nbytes >= _SHARED_BYTES:
            with Team(self._num_threads - 1) as team:
                enough_memory = self._run(self._address, team, N, source, y.data_ptr())
        else:
            enough_memory = self._run(self._address, 0, N, source, y.data_ptr())
        if not enough_memory:
            raise MemoryError(f"no memory for what a call with {N} rows of x works on")
        return y

    def _place(self) -> LinearFields:
        """Divide up scratch memory, of which padded bias and scales are the first part."""
        matrix = self._matrix
        row_bytes = max(matrix.input_bytes, matrix.gate_bytes, 1)
        window = _TILE * max(1, _WINDOW_BYTES // (_TILE * row_bytes))
        kernel = _whole_lines(2 * matrix.gate_bytes)
        packed_scales = kernel + _whole_lines(KERNEL_BYTES)
        packed = packed_scales + _whole_lines(window * FLOAT_BYTES)
        return LinearFields(self._record.ctypes.data, window, kernel, packed_scales, packed)


def _whole_lines(size: int) -> int:
    return -(-size // _LINE_BYTES) * _LINE_BYTES
