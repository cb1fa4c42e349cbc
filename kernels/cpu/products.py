"""Many rows times a block-sparse matrix, W v + b: the input projection, and the projection of an LSTM's output.

| tensor | shape                         | dtype            |                                        |
|--------|-------------------------------|------------------|----------------------------------------|
| W      | a BlockMatrix [G H, columns]  | layout.dtype     | read                                   |
| scales | [G, padded H]                 | float32          | read, where W is int8                  |
| bias   | [G, padded H]                 | float32          | read                                   |
| inputs | [rows, padded columns]        | float32 or int8  | read, as pack.py leaves it             |
| output | [rows, G, padded H]           | float32          | written                                |

"Padded" is filled up to whole blocks: no vector needs a mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton_sparse_rnn.kernels.cpu.gate_sums import gate_sums
from triton_sparse_rnn.kernels.cpu.matrix import MatrixFields
from triton_sparse_rnn.kernels.cpu.stored_weights import BlockFormat
from triton_sparse_rnn.kernels.cpu.vector_code import VectorCode


class ProductFields(NamedTuple):
    """Addresses and sizes. The distance between rows is in bytes."""

    matrix: Any  # address of MatrixFields
    scales: Any
    bias: Any
    inputs: Any
    input_scales: Any
    rows: Any
    output: Any
    output_bytes: Any


def emit_product(builder: Any, layout: BlockFormat, address: Any, first: Any, end: Any) -> None:
    """Emit the kernel for vectors first, ..., end - 1 of each gate."""
    code = VectorCode(builder, layout.width)
    fields = code.fields(ProductFields, code.index(address))
    matrix = code.fields(MatrixFields, fields.matrix)
    for row, tile_rows in code.row_tiles(fields.rows, layout.tile_rows):
        outputs = [fields.output + fields.output_bytes * (row + i) for i in range(tile_rows)]
        with code.loop(code.index(first), code.index(end)) as vector, code.loop(code.index(0), matrix.gates) as gate:
            sums = gate_sums(code, layout, matrix, fields, row, tile_rows, vector, gate)
            for total, output in zip(sums, outputs, strict=True):
                code.store(total, output + gate * matrix.gate_bytes, vector)
