"""Rows of picked units times inputs, the other inner loop: each lane of a vector of weights has its own input.

Weight c of row r of unit u is multiplied by input columns[u] * bank + picks[u, c, r] (sparse/picked_storage.py). Units
lie in entries of 4, 3, 2 and then 1 of one bank, so there are four loops, each of a known number of units a turn: its
bank is loaded once for all of them, and no branch depends on how many units a bank has. AVX-512 reads the picks of
float inputs in words (pick_words.py), and everything else in bytes, as they are stored.

Rows of a tile lie one behind the other, each filled up with zeros to whole banks, so that banks are loaded whole. The
sums of a row of units whose banks have one each are those of 16x1 blocks to the bit, if all its picks are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from triton_sparse_rnn.kernels.cpu.banks import BytePicker, picker
from triton_sparse_rnn.kernels.cpu.block_products import ColumnSums, InputTile, QuadSums
from triton_sparse_rnn.kernels.cpu.matrix import MatrixFields
from triton_sparse_rnn.kernels.cpu.pick_words import PICK_BITS, units_in_word
from triton_sparse_rnn.kernels.cpu.stored_weights import QUAD, BlockFormat
from triton_sparse_rnn.kernels.cpu.vector_code import FLOAT_BYTES, INT32, Accumulator, Index, Integers, VectorCode
from triton_sparse_rnn.sparse.picks import ENTRY_UNITS


class PickedSums(ColumnSums):
    """One multiplication and one addition for each column of a unit and each row: of floats, or of integers."""

    def __init__(self, code: VectorCode, layout: BlockFormat, matrix: MatrixFields, tile: InputTile, part: Index):
        super().__init__(code, layout, matrix, tile, part)
        self.picker = picker(code, layout.bank, quantized=layout.quantized)

    def multiply(self, block_row: Index) -> None:
        layout, BC = self.layout, self.layout.BC

        def add(n: int, unit: Index, banks: Sequence[Any]) -> None:
            for c in range(BC):
                vector = (unit * BC + c) * layout.parts + self.part
                self.add_vector(n * BC + c, vector, banks, self.picker.load_picks(self.matrix.picks, vector))

        def add_of_word(n: int, unit: Index, banks: Sequence[Any], word: Integers) -> None:
            registers = [self.code.part(word.value, first, 16) for first in range(0, layout.width, 16)]
            self.add_vector(n, unit * layout.parts + self.part, banks, registers)

        if layout.reads_words:
            _visit_words(self, self.picker.load_bank, block_row, add_of_word)
        else:
            _visit_units(self, self.picker.load_bank, block_row, add, self.chains // BC)

    def add_vector(self, n: int, vector: Index, banks: Sequence[Any], picks: Any) -> None:
        """Add the products of a vector of weights, as number n of those in flight."""
        weights = self.load_weights(vector)
        for chains, bank in zip(self.sums, banks, strict=True):
            chains[n % self.chains].add(weights * self.picker.pick(bank, picks))


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
    for units, begin, end in _classes(sums, row):
        done = begin
        for entries in sorted({max(1, at_once // units), 1}, reverse=True):
            stop = end - (end - done) % (entries * units) if entries > 1 else end
            with sums.code.loop(done, stop, entries * units) as first:
                for n in range(0, entries * units, units):
                    banks = _load_banks(sums, load_bank, first + n)
                    for unit in range(n, n + units):
                        visit(unit, first + unit, banks)
            done = stop


def _visit_words(
    sums: PickedSums,
    load_bank: Callable[[Index], Any],
    row: Index,
    visit: Callable[[int, Index, Sequence[Any], Integers], None],
) -> None:
    """The same, a full word a turn. `visit` is given a word as well, with the unit's picks in its lowest bits."""
    code, matrix, parts = sums.code, sums.matrix, sums.layout.parts

    def load_word(number: Index) -> Integers:
        return Integers(code, code.load_elements(matrix.words, number * parts + sums.part, INT32))

    def visit_entry(n: int, first: Index, units: int, word: Integers) -> Integers:
        banks = _load_banks(sums, load_bank, first)
        for unit in range(units):
            visit(n + unit, first + unit, banks, word)
            word = word >> PICK_BITS
        return word

    # These loops have few turns each: those that LLVM makes of several would often leave one behind.
    for number, (units, begin, end) in enumerate(_classes(sums, row)):
        full = units_in_word(units)
        words = code.load_index(matrix.word_starts, row * ENTRY_UNITS + number)
        whole = (end - begin) // full
        with code.loop(code.index(0), whole, unroll=False) as turn:
            word, first = load_word(words + turn), begin + turn * full
            for n in range(0, full, units):
                word = visit_entry(n, first + n, units, word)
        if full == units:
            continue
        left = begin + whole * full
        with code.if_below(left, end):
            rest = Accumulator(load_word(words + whole))
            with code.loop(left, end, units, unroll=False) as first:
                rest.write(visit_entry(0, first, units, rest.read()))


def _classes(sums: ColumnSums | QuadSums, row: Index) -> Iterator[tuple[int, Index, Index]]:
    """Yield of each class of a row of blocks the units of an entry, and where it begins and ends."""
    code, starts = sums.code, sums.matrix.starts
    begin = code.load_index(starts, row * ENTRY_UNITS)
    for number, units in enumerate(range(ENTRY_UNITS, 0, -1)):
        end = code.load_index(starts, row * ENTRY_UNITS + (number + 1))
        yield units, begin, end
        begin = end


def _load_banks(sums: ColumnSums | QuadSums, load_bank: Callable[[Index], Any], unit: Index) -> list[Any]:
    """The bank of a unit, of each row of the tile."""
    code, matrix, tile = sums.code, sums.matrix, sums.tile
    bank_bytes = sums.layout.bank * (1 if sums.layout.quantized else FLOAT_BYTES)
    place = tile.inputs + code.load_index(matrix.columns, unit) * bank_bytes
    return [load_bank(place + matrix.input_bytes * i) for i in range(tile.rows)]
