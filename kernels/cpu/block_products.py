"""Rows of blocks times inputs: the inner loop of kernels, emitted where it is needed.

Column c of block k is a vector of weights, so with the input v the product of the row of blocks is the vector

    start + sum over k, c of values[k, c] * v[columns[k] * BC + c]

and a pruned block is not read at all. A tile of inputs shares each load of a weight. It lies in memory as pack.py
leaves it, number i of all its inputs together: v0[0] v1[0] ... v0[1] v1[1] ...

Weights in int8 are integers here, and their scale comes last: with inputs near 1e36 these sums may leave float32 where
those of weights and inputs would not.

Quantised inputs are bytes, their sums are int32, and the result is start + sum * scale of the weights * scale of the
input. Where there is an instruction for it, vpdpbusd, a sum takes four columns, a quad, at once.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from triton_sparse_rnn.kernels.cpu.matrix import MatrixFields
from triton_sparse_rnn.kernels.cpu.stored_weights import QUAD, BlockFormat, load_integers, load_weights
from triton_sparse_rnn.kernels.cpu.vector_code import INT8, Accumulator, Index, Integers, VectorCode

_CHAINS = 4  # sums in flight at least, because a multiply-add waits for the one before it in the same sum
_COLUMNS_UNROLLED = 8  # of a wide block; the rest of it is a loop, so that code does not grow with BC
INPUT_OFFSET = 128  # what the bytes of inputs hold more than their value for vpdpbusd, which takes them as unsigned


class InputTile(NamedTuple):
    """Inputs that share each load of a weight."""

    rows: int
    inputs: Index  # address
    scales: Index  # address of a float32 for each input that is quantised


class _Column(NamedTuple):
    """A column of a stored block, and the number of the input that it is multiplied by."""

    stored: Index
    input: Index


def _visit_columns(
    code: VectorCode,
    layout: BlockFormat,
    matrix: MatrixFields,
    row: Index,
    visit: Callable[[Sequence[_Column]], None],
    at_once: int,
) -> None:
    """Emit loops over the stored blocks of a row that hand their columns to `visit`, about `at_once` at a time."""
    BC = layout.BC

    def visit_blocks(block: Index, count: int) -> None:
        inputs = [code.load_index(matrix.columns, block + k) * BC for k in range(count)]
        if BC <= _COLUMNS_UNROLLED:
            visit([_Column((block + k) * BC + c, inputs[k] + c) for k in range(count) for c in range(BC)])
            return
        whole = BC - BC % _COLUMNS_UNROLLED
        with code.loop(code.index(0), code.index(whole), _COLUMNS_UNROLLED) as first:
            visit([_Column(block * BC + first + c, inputs[0] + first + c) for c in range(_COLUMNS_UNROLLED)])
        if whole < BC:
            visit([_Column(block * BC + c, inputs[0] + c) for c in range(whole, BC)])

    done, end = code.load_index(matrix.starts, row), code.load_index(matrix.starts, row + 1)
    for count in sorted({max(1, at_once // BC), min(4, max(1, at_once // BC)), 1}, reverse=True):
        stop = end - (end - done) % count
        with code.loop(done, stop, count) as block:
            visit_blocks(block, count)
        done = stop


class ColumnSums:
    """One multiplication and one addition for each column and input: of floats, or of integers."""

    def __init__(self, code: VectorCode, layout: BlockFormat, matrix: MatrixFields, tile: InputTile, part: Index):
        self.code, self.layout, self.matrix, self.tile, self.part = code, layout, matrix, tile, part
        self.chains = max(1, _CHAINS // tile.rows)
        self.columns_in_flight = 2 * self.chains if tile.rows == 1 else self.chains  # fewer ends of loops to guess
        zero: Any = code.integers(0) if layout.quantized else code.constant(0.0)
        self.sums = [[Accumulator(zero) for _ in range(self.chains)] for _ in range(tile.rows)]

    def multiply(self, block_row: Index) -> None:
        """Add the products with all that is stored of a row of blocks."""
        _visit_columns(self.code, self.layout, self.matrix, block_row, self._add, self.columns_in_flight)

    def totals(self) -> list[Any]:
        return [functools.reduce(operator.add, (chain.read() for chain in chains)) for chains in self.sums]

    def load_weights(self, vector: Index) -> Any:
        if self.layout.quantized:
            return load_integers(self.code, self.matrix.values, vector)
        return load_weights(self.code, self.layout.dtype, self.matrix.values, vector)

    def _add(self, columns: Sequence[_Column]) -> None:
        for n, column in enumerate(columns):
            weights = self.load_weights(column.stored * self.layout.parts + self.part)
            for i, chains in enumerate(self.sums):
                chains[n % self.chains].add(weights * self._input(column.input * self.tile.rows + i))

    def _input(self, index: Index) -> Any:
        load = self.code.load_broadcast_byte if self.layout.quantized else self.code.load_broadcast
        return load(self.tile.inputs, index)


class QuadSums:
    """One vpdpbusd for a quad and an input, and one for what the offset of inputs adds: the last of the sums."""

    def __init__(self, code: VectorCode, layout: BlockFormat, matrix: MatrixFields, tile: InputTile, part: Index):
        self.code, self.layout, self.matrix, self.tile, self.part = code, layout, matrix, tile, part
        self.chains = max(1, _CHAINS // (tile.rows + 1))
        self.sums = [[Accumulator(code.integers(0)) for _ in range(self.chains)] for _ in range(tile.rows + 1)]

    def multiply(self, block_row: Index) -> None:
        """Add the products with all that is stored of a row of blocks."""
        _visit_columns(self.code, self.layout, self.matrix, block_row, self._add, self.chains * QUAD)

    def totals(self) -> list[Integers]:
        *totals, offset = (functools.reduce(operator.add, (chain.read() for chain in chains)) for chains in self.sums)
        return [total - offset for total in totals]

    def load_quads(self, address: Index, columns: Sequence[Index]) -> Any:
        """Row after row, each with its bytes of up to four stored columns; 0 for a column that there is not."""
        code, width, parts = self.code, self.layout.width, self.layout.parts
        if parts == 1:  # columns follow one another in memory, from block to block as well
            stored = code.load_elements(address, columns[0], INT8, len(columns))
            zeros = stored.type(None)
            count = len(columns)
            lanes = [c * width + r if c < count else count * width for r in range(width) for c in range(QUAD)]
            return code.shuffle(stored, zeros, lanes)
        vectors = [code.load_elements(address, column * parts + self.part, INT8) for column in columns]
        return code.interleave(vectors + [vectors[0].type(None)] * (QUAD - len(columns)))

    def add_quads(self, n: int, weights: Any, inputs: Sequence[Integers]) -> None:
        """Add the products of quads, as number n of those in flight; `inputs` are of each row of the tile."""
        offsets = self.code.integers(int.from_bytes([INPUT_OFFSET] * QUAD, "little"))
        for chains, row_inputs in zip(self.sums, [*inputs, offsets], strict=True):
            chain = chains[n % self.chains]
            chain.write(self.code.add_byte_products(chain.read(), row_inputs, weights))

    def _add(self, columns: Sequence[_Column]) -> None:
        for n in range(0, len(columns), QUAD):
            quad = columns[n : n + QUAD]
            weights = self.load_quads(self.matrix.values, [column.stored for column in quad])
            self.add_quads(n // QUAD, weights, self._inputs(quad))

    def _inputs(self, quad: Sequence[_Column]) -> list[Integers]:
        """The four bytes of each input, in every lane."""
        code, tile = self.code, self.tile
        if self.layout.quad == QUAD:
            first = quad[0].input // QUAD * tile.rows
            return [code.load_broadcast_int32(tile.inputs, first + i) for i in range(tile.rows)]
        bytes_of = [code.load_bytes(tile.inputs, column.input * tile.rows, tile.rows) for column in quad]
        return code.broadcast_int32s(code.interleave(bytes_of + [bytes_of[0].type(None)] * (QUAD - len(quad))))
