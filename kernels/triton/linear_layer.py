"""A linear layer on a GPU: its weight in the order in which block_product.py reads it.

| tensor | shape                         | dtype          |                   |
|--------|-------------------------------|----------------|-------------------|
| weight | a BlockMatrix [rows, columns] | f32, f16, bf16 | read; one gate    |
| bias   | [rows]                        | floating       | read              |
| x      | [..., columns]                | f32, f16, bf16 | read; any strides |
| y      | [..., rows]                   | dtype of x     | written           |
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_sparse_rnn.kernels.triton.block_product import block_product
from triton_sparse_rnn.kernels.triton.recurrent_layer import on, refuse_first_in_capture
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.row_blocks import row_blocks


class LinearLayer:
    """A layer ready to run. Nothing is checked; the tensors must not change."""

    def __init__(self, weight: BlockMatrix, bias: Tensor | None) -> None:
        """Bring the weight into the order in which kernels read it, which waits for the device."""
        self.device = weight.values.device
        self._shapes: set[Any] = set()  # of calls that have run
        with on(self.device):
            self._weight = row_blocks(weight)
            self._bias = None if bias is None else bias.float()
            if self.device.type == "cuda":
                torch.cuda.current_stream().synchronize()  # a later call may be on another stream

    def __call__(self, x: Tensor) -> Tensor:
        """Return y [..., rows] of x [..., columns]."""
        rows = x.reshape(-1, x.shape[-1])
        with on(self.device):
            refuse_first_in_capture(self._shapes, rows, [rows], None)  # a linear layer has no state but its input
            y = block_product(rows, self._weight, self._bias)
            return y.to(x.dtype).view(*x.shape[:-1], y.shape[1])
