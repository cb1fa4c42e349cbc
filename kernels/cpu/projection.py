"""The input projection of many rows, W_ih x + b_ih, in the order in which the cells read it.

| tensor    | shape                          | dtype   |         |
|-----------|--------------------------------|---------|---------|
| W_ih      | a BlockMatrix [G H, I]         | float32 | read    |
| bias      | [G, groups, BR], 0 beyond H    | float32 | read    |
| x         | [rows, padded I], 0 beyond I   | float32 | read    |
| projected | [rows, groups, G, BR]          | float32 | written |

The rows of x are whole block columns long, as the blocks at the edge read them.
"""

from __future__ import annotations

import functools
from typing import Any

from triton_sparse_rnn.kernels.cpu.block_products import BlockAddresses, block_row_products
from triton_sparse_rnn.kernels.cpu.intrinsics import FLOAT_BYTES, compile_kernel
from triton_sparse_rnn.kernels.cpu.vector_code import VectorCode


@functools.cache
def compile_projection(BR: int, BC: int) -> Any:
    """Return the kernel, as a numba cfunc, for blocks of BR x BC."""

    def emit(builder: Any, *arguments: Any) -> None:
        code = VectorCode(builder, BR)
        rows, groups, G, starts, columns, values, bias, x, x_bytes, projected = map(code.index, arguments)
        matrix = BlockAddresses(starts, columns, values)
        for row, tile in code.row_tiles(rows):
            inputs = [x + x_bytes * (row + i) for i in range(tile)]
            outputs = [projected + groups * G * (BR * FLOAT_BYTES) * (row + i) for i in range(tile)]
            with code.loop(code.index(0), groups) as group, code.loop(code.index(0), G) as gate:
                block_row = group * G + gate
                start = code.load(bias, gate * groups + group)
                products = block_row_products(code, matrix, BC, block_row, inputs, start)
                for product, output in zip(products, outputs, strict=True):
                    code.store(product, output, block_row)

    return compile_kernel(emit)
