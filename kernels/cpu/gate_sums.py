"""W v + b of one gate of a vector of units: what every kernel is made of."""

from __future__ import annotations

from typing import Any

from triton_sparse_rnn.kernels.cpu.block_products import ColumnSums, InputTile, QuadSums
from triton_sparse_rnn.kernels.cpu.matrix import MatrixFields
from triton_sparse_rnn.kernels.cpu.picked_products import PickedQuadSums, PickedSums
from triton_sparse_rnn.kernels.cpu.stored_weights import BlockFormat
from triton_sparse_rnn.kernels.cpu.vector_code import Index, Integers, Vector, VectorCode


def gate_sums(
    code: VectorCode,
    layout: BlockFormat,
    matrix: MatrixFields,
    fields: Any,
    row: Index,
    tile_rows: int,
    vector: Index,
    gate: Index,
) -> list[Vector]:
    """Return W v + b of one gate of a vector of units, for each row v of a tile that begins at `row`.

    Args:
        fields: scales, bias, inputs and input_scales, addresses as in ProductFields.
    """
    constants = gate * matrix.gate_bytes
    start = code.load(fields.bias + constants, vector)
    scale = code.load(fields.scales + constants, vector) if layout.dtype == "int8" else None
    tile = InputTile(tile_rows, fields.inputs + matrix.input_bytes * row, fields.input_scales + row * 4)
    if layout.bank:
        kind = PickedQuadSums if layout.multiplies_quads else PickedSums
    else:
        kind = QuadSums if layout.multiplies_quads else ColumnSums
    sums = kind(code, layout, matrix, tile, vector % layout.parts)
    sums.multiply(vector // layout.parts * matrix.gates + gate)
    results = []
    for i, total in enumerate(sums.totals()):
        product = total.to_floats() if isinstance(total, Integers) else total
        if scale is not None:
            product = product * (scale * code.load_broadcast(tile.scales, code.index(i)) if layout.quantized else scale)
        results.append(product + start)
    return results
