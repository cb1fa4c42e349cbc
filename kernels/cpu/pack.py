"""Rows of floats brought into the order in which products read them, and quantised if they are to be.

| tensor | shape           | dtype           |                                            |
|--------|-----------------|-----------------|--------------------------------------------|
| source | [rows, columns] | float32         | read                                       |
| target | [rows, padded]  | float32 or int8 | written, tile after tile, 0 beyond columns |
| scales | [rows]          | float32         | written, of quantised rows                 |

A tile is up to `tile_rows` rows. Its numbers lie column after column, those of all rows together, so that a product
reads neighbours. With quad = 4 the four bytes of columns 4 k, ..., 4 k + 3 of a row stay together.

    rows   a0 a1 a2 a3 ...     quad = 1   a0 b0 a1 b1 a2 b2 a3 b3 ...
           b0 b1 b2 b3 ...     quad = 4   a0 a1 a2 a3 b0 b1 b2 b3 ...

A row v is quantised to q = round(v * (1 / s)) with s = max |v| / 127, ties to even, all in float32. The scale of a row
that holds NaN or infinity is NaN. A row with a scale below 2^-126 counts as zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from llvmlite import ir

from triton_sparse_rnn.kernels.cpu.block_products import INPUT_OFFSET
from triton_sparse_rnn.kernels.cpu.stored_weights import BlockFormat
from triton_sparse_rnn.kernels.cpu.vector_code import INT8, INT32, Accumulator, Index, Vector, VectorCode

_WIDTH = 16  # columns at a time
_INFINITY, _SMALLEST, _NAN = 0x7F800000, 0x00800000, 0x7FC00000  # bits of float32: infinity, 2^-126, NaN


class PackFields(NamedTuple):
    """Sizes and addresses."""

    columns: Any
    padded: Any
    source: Any
    source_bytes: Any  # between rows
    target: Any
    scales: Any


class PackFormat(NamedTuple):
    """What the kernel is compiled for."""

    tile_rows: int
    quad: int
    quantized: bool
    offset: int  # added to a quantised number

    @classmethod
    def for_product(cls, layout: BlockFormat) -> PackFormat:
        """How a product with such a matrix reads its inputs."""
        offset = INPUT_OFFSET if layout.multiplies_quads else 0
        tile_rows = 1 if layout.bank else layout.tile_rows  # a bank is a piece of one row
        return cls(tile_rows, layout.quad, layout.quantized, offset)


def emit_pack(builder: Any, layout: PackFormat, address: Any, first: Any, end: Any) -> None:
    """Emit the kernel for rows 0, ..., end - 1; `first` is 0."""
    code, one = VectorCode(builder, _WIDTH), VectorCode(builder, 1)
    fields = code.fields(PackFields, code.index(address))
    zero = code.index(0)
    for row, tile in code.row_tiles(code.index(end), layout.tile_rows):
        sources = [fields.source + fields.source_bytes * (row + i) for i in range(tile)]
        scales = [_scale_of_row(code, one, source, fields.columns) if layout.quantized else None for source in sources]
        for i, scale in enumerate(scales):
            if scale is not None:
                one.store(scale, fields.scales, row + i)
        target = fields.target + fields.padded * row * (1 if layout.quantized else 4)
        whole = fields.columns - fields.columns % _WIDTH
        for part, begin, stop in ((code, zero, whole), (one, whole, fields.columns)):
            with part.loop(begin, stop, part.width) as column:
                vectors = [part.load(source + column * 4, zero) for source in sources]
                _store(layout, part, [*zip(vectors, scales, strict=True)], target, column)
        with one.loop(fields.columns, fields.padded) as column:
            _store(layout, one, [(one.constant(0.0), scale) for scale in scales], target, column)


def _scale_of_row(code: VectorCode, one: VectorCode, source: Index, columns: Index) -> Vector:
    """Return max |v| / 127. Without their sign, floats are in the order of their bits, NaN behind infinity."""
    whole, zero = columns - columns % code.width, code.index(0)
    largest = []
    for part, begin, stop in ((code, zero, whole), (one, whole, columns)):
        largest.append(Accumulator(part.integers(0)))
        with part.loop(begin, stop, part.width) as column:
            bits = part.load(source + column * 4, zero).as_integers() & 0x7FFFFFFF
            so_far = largest[-1].read()
            largest[-1].write(bits.where(">", so_far, bits, so_far))
    bits, rest = one.largest(largest[0].read()), largest[1].read()
    bits = bits.where(">", rest, bits, rest)
    scale = bits.as_floats() / 127.0
    return bits.where("<", _INFINITY, scale.as_integers(), one.integers(_NAN)).as_floats()


def _store(
    layout: PackFormat,
    code: VectorCode,
    rows: Sequence[tuple[Vector, Vector | None]],
    target: Index,
    column: Index,
) -> None:
    """Store some columns of all rows of a tile."""
    tile = len(rows)
    if not layout.quantized:
        code.store_elements(code.interleave([vector.value for vector, _ in rows]), target, column * tile)
        return
    row_bytes = [_quantized(layout, vector, scale) for vector, scale in rows]
    if layout.quad == 1:
        code.store_elements(code.interleave(row_bytes), target, column * tile)
    elif code.width == 1:
        for i, byte in enumerate(row_bytes):
            code.store_elements(byte, target, (column // 4 * tile + i) * 4 + column % 4)
    else:
        quads = ir.VectorType(INT32, code.width // 4)
        code.store_elements(
            code.interleave([code.builder.bitcast(value, quads) for value in row_bytes]), target, column // 4 * tile
        )


def _quantized(layout: PackFormat, vector: Vector, scale: Vector | None) -> Any:
    """LLVM's vector of int8."""
    assert scale is not None
    code, one = vector.code, scale.code
    bits = scale.as_integers()
    inverse = bits.where("<", _SMALLEST, one.integers(0), (one.constant(1.0) / scale).as_integers()).as_floats()
    everywhere = Vector(code, code.shuffle(inverse.value, inverse.value, [0] * code.width))
    return code.builder.trunc(
        ((vector * everywhere).rounded() + code.integers(layout.offset)).value, ir.VectorType(INT8, code.width)
    )
