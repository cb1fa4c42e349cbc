"""Rows of picked units times inputs, the other inner loop: each lane of a vector of weights has its own input.

Weight c of row r of unit u is multiplied by input columns[u] * bank + picks[u, c, r] (sparse/picked_storage.py). Units
lie in entries of 4, 3, 2 and then 1 of one bank, so there are four loops, each of a known number of units a turn: its
bank is loaded once for all of them, and no branch depends on how many units a bank has.

Rows of a tile lie one behind the other, each filled up with zeros to whole banks, so that banks are loaded whole. The
sums of a row of units whose banks have one each are those of 16x1 blocks to the bit, if all its picks are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from triton_sparse_rnn.kernels.cpu.banks import BytePicker, picker
from triton_sparse_rnn.kernels.cpu.block_products import ColumnSums, InputTile, QuadSums
from triton_sparse_rnn.kernels.cpu.matrix import MatrixFields
from triton_sparse_rnn.kernels.cpu.stored_weights import QUAD, BlockFormat
from triton_sparse_rnn.kernels.cpu.vector_code import FLOAT_BYTES, Index, VectorCode
from triton_sparse_rnn.sparse.picked_storage import ENTRY_UNITS


class PickedSums(ColumnSums):
    """One multiplication and one addition for each column of a unit and each row: of floats, or of integers."""

    def __init__(self, code: VectorCode, layout: BlockFormat, matrix: MatrixFields, tile: InputTile, part: Index):
        super().__init__(code, layout, matrix, tile, part)
        self.picker = picker(code, layout.bank, quantized=layout.quantized)

    def multiply(self, block_row: Index) -> None:
        BC = self.layout.BC

        def add(n: int, unit: Index, banks: Sequence[Any]) -> None:
            for c in range(BC):
                vector = (unit * BC + c) * self.layout.parts + self.part
                weights, picks = self.load_weights(vector), self.picker.load_picks(self.matrix.picks, vector)
                for chains, bank in zip(self.sums, banks, strict=True):
                    chains[(n * BC + c) % self.chains].add(weights * self.picker.pick(bank, picks))

        _visit_units(self, self.picker.load_bank, block_row, add, self.chains // BC)


class PickedQuadSums(QuadSums):
    """One vpdpbusd for a unit, each row of which is a quad, and a row of the tile, and one for the offset of inputs."""

    def multiply(self, block_row: Index) -> None:
        byte_picker = BytePicker(self.code, self.layout.bank)

        def add(n: int, unit: Index, banks: Sequence[Any]) -> None:
            columns = [unit * QUAD + c for c in range(QUAD)]
            picks = self.load_quads(self.matrix.picks, columns)
            inputs = [byte_picker.pick(bank, picks) for bank in banks]
            self.add_quads(n, self.load_quads(self.matrix.values, columns), inputs)

        _visit_units(self, byte_picker.load_bank, block_row, add, self.chains)


def _visit_units(
    sums: ColumnSums | QuadSums,
    load_bank: Callable[[Index], Any],
    row: Index,
    visit: Callable[[int, Index, Sequence[Any]], None],
    at_once: int,
) -> None:
    """Emit loops over the entries of a row of blocks, about `at_once` units of them a turn.

    Args:
        visit: emits the code of a unit. It is given which of a turn's it is, its number among all that are stored, and
            its bank, of each row of the tile.
    """
    code, matrix, tile = sums.code, sums.matrix, sums.tile
    bank_bytes = sums.layout.bank * (1 if sums.layout.quantized else FLOAT_BYTES)
    rows = [tile.inputs + matrix.input_bytes * i for i in range(tile.rows)]

    def visit_entry(n: int, first: Index, units: int) -> None:
        place = code.load_index(matrix.columns, first) * bank_bytes
        banks = [load_bank(inputs + place) for inputs in rows]
        for unit in range(units):
            visit(n + unit, first + unit, banks)

    starts = row * ENTRY_UNITS
    done = code.load_index(matrix.starts, starts)
    for number, units in enumerate(range(ENTRY_UNITS, 0, -1)):
        end = code.load_index(matrix.starts, starts + (number + 1))
        for entries in sorted({max(1, at_once // units), 1}, reverse=True):
            stop = end - (end - done) % (entries * units) if entries > 1 else end
            with code.loop(done, stop, entries * units) as first:
                for n in range(0, entries * units, units):
                    visit_entry(n, first + n, units)
            done = stop
