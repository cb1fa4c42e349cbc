"""The numbers of a matrix that are not 0, as the lists that sparse_products.py sums up.

| tensor | shape             | dtype   |                                                                           |
|--------|-------------------|---------|---------------------------------------------------------------------------|
| D      | [rows, columns]   | float32 | read                                                                      |
| starts | [tiles, sums + 1] | int32   | written: the first term of a list, which ends where the next one begins   |
| values | [terms]           | float32 | written: every v != 0, and so NaN                                         |
| places | [terms]           | uint16  | written: the byte of a tile where the row begins that v is multiplied by  |

By rows, a sum is a row of D and a tile is TILE_ROWS columns of it; by columns, a sum is a column and a tile is
TILE_ROWS rows. The last tile may be smaller. Lists follow one another as starts do, and each is in the order of D.
Values and places have room for all numbers of D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils

from triton_sparse_rnn.kernels.cpu import target
from triton_sparse_rnn.kernels.cpu.vector_code import FLOAT_BYTES, INT16, INT32, INT64, Index, VectorCode

VECTOR_FLOATS = 16
PANEL_ROW_BYTES = 256
TILE_ROWS = 128  # 32 KB in all, which a place counts; 96 to 192 are as fast
_START_BYTES, _PLACE_BYTES = 4, 2


class Lists(NamedTuple):
    """Addresses."""

    starts: Index
    values: Index
    places: Index


def lists_bytes(sums: int, tiled: int) -> tuple[int, int, int]:
    """Return the sizes of starts, values and places, for lists of so many sums over so many columns or rows of D."""
    terms = sums * tiled
    return _START_BYTES * -(-tiled // TILE_ROWS) * (sums + 1), FLOAT_BYTES * terms, _PLACE_BYTES * terms


def list_of(code: VectorCode, lists: Lists, sums: Index, tile: Index, number: Index) -> tuple[Index, Index]:
    """The first term of the list of a sum in a tile, and the end."""
    start = (sums + 1) * tile + number
    return code.load_index(lists.starts, start), code.load_index(lists.starts, start + 1)


def write_lists(
    code: VectorCode, by_columns: bool, D: Index, D_bytes: Index, rows: Index, columns: Index, lists: Lists
) -> None:
    """Emit what lists D, whose rows lie D_bytes apart; `code` has vectors of VECTOR_FLOATS floats."""
    (_list_columns if by_columns else _list_rows)(code, D, D_bytes, rows, columns, _Writer(code, lists))


def fetch(code: VectorCode, address: Index) -> None:
    """Ask for a cache line that is going to be read; the address may be any."""
    builder, near = code.builder, 2  # the second-level cache: the first is full of what is read now
    kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, INT32, INT32, INT32])
    function = builder.module.declare_intrinsic("llvm.prefetch", (cgutils.voidptr_t,), kind)
    builder.call(function, [builder.inttoptr(address.value, cgutils.voidptr_t), INT32(0), INT32(near), INT32(1)])


def _list_rows(code: VectorCode, D: Index, D_bytes: Index, rows: Index, columns: Index, writer: _Writer) -> None:
    with code.loop(code.index(0), columns, TILE_ROWS) as column:
        count = code.smaller(columns - column, code.index(TILE_ROWS))
        with code.loop(code.index(0), rows) as row:
            writer.begin_list()
            writer.append(D + D_bytes * row + column * FLOAT_BYTES, count, fetched=TILE_ROWS * FLOAT_BYTES)
        writer.begin_list()


def _list_columns(code: VectorCode, D: Index, D_bytes: Index, rows: Index, columns: Index, writer: _Writer) -> None:
    turned = code.stack(TILE_ROWS)  # some columns of a tile, each contiguous
    with code.loop(code.index(0), rows, TILE_ROWS) as row:
        count = code.smaller(rows - row, code.index(TILE_ROWS))
        for part, column in code.vectors_of(columns):
            _turn(part, D + D_bytes * row + column * FLOAT_BYTES, D_bytes, count, turned)
            with part.loop(part.index(0), part.index(part.width)) as i:
                writer.begin_list()
                writer.append(turned + i * (TILE_ROWS * FLOAT_BYTES), count)
        writer.begin_list()


def _turn(code: VectorCode, source: Index, source_bytes: Index, rows: Index, turned: Index) -> None:
    """Write a vector of each row as columns, TILE_ROWS floats apart."""
    zero, width = code.index(0), code.width
    whole = rows - rows % width
    with code.loop(zero, whole, width) as row:
        places = [source + source_bytes * (row + i) for i in range(width)]
        for i, column in enumerate(_transposed(code, [code.load(place, zero).value for place in places])):
            code.store_elements(column, turned, row + i * TILE_ROWS)
        for place in places:
            fetch(code, place + width * FLOAT_BYTES)
    with code.loop(whole, rows) as row:
        vector = code.load(source + source_bytes * row, zero).value
        for i in range(width):
            code.store_elements(code.shuffle(vector, vector, [i]), turned, row + i * TILE_ROWS)


def _transposed(code: VectorCode, rows: Sequence[Any]) -> list[Any]:
    """The columns of as many of LLVM's vectors as each has lanes, which are a power of two."""
    vectors, size = list(rows), len(rows)
    step = size // 2
    while step:  # exchange the blocks of step x step that lie across the diagonal
        kept = [lane if not lane & step else size + lane - step for lane in range(size)]
        other = [lane + step if not lane & step else size + lane for lane in range(size)]
        for i in (i for i in range(size) if not i & step):
            pair = vectors[i], vectors[i + step]
            vectors[i], vectors[i + step] = code.shuffle(*pair, kept), code.shuffle(*pair, other)
        step //= 2
    return vectors


class _Writer:
    """Writes starts and terms, one after another."""

    def __init__(self, code: VectorCode, lists: Lists):
        self.code, self.one, self.lists = code, VectorCode(code.builder, 1), lists
        self.begun, self.terms = _Counter(code), _Counter(code)

    def begin_list(self) -> None:
        _store_integer(self.one, self.terms.read(), INT32, self.lists.starts, self.begun.read())
        self.begun.add(self.code.index(1))

    def append(self, source: Index, count: Index, fetched: int = 0) -> None:
        """Append a list: numbers that are contiguous, at most TILE_ROWS.

        Those that lie `fetched` bytes behind them are read next.
        """
        whole = self.code.index(0)
        if target.vector_path() == "AVX-512":
            whole = count - count % VECTOR_FLOATS
            with self.code.loop(self.code.index(0), whole, VECTOR_FLOATS) as i:
                if fetched:
                    fetch(self.code, source + i * FLOAT_BYTES + fetched)
                self._append_vector(source + i * FLOAT_BYTES, i * PANEL_ROW_BYTES)
        with self.one.loop(whole, count) as i:
            self._append_number(source + i * FLOAT_BYTES, i * PANEL_ROW_BYTES)

    def _append_vector(self, source: Index, place: Index) -> None:
        """What is not 0 moves to the first lanes, and what the others hold is stored over by the next terms.

        (The instruction that stores just the first is slow microcode on a Zen 4.)
        """
        code, builder = self.code, self.code.builder
        values = code.load(source, code.index(0)).value
        kept = builder.fcmp_unordered("!=", values, values.type(None))
        packed = code.call_llvm(f"llvm.x86.avx512.mask.compress.v{VECTOR_FLOATS}f32", values.type, values, values, kept)
        code.store_elements(packed, self.lists.values, self.terms.read())
        places = (code.lane_numbers() * code.integers(PANEL_ROW_BYTES) + code.broadcast_low_bits(place)).value
        packed = code.call_llvm(f"llvm.x86.avx512.mask.compress.v{VECTOR_FLOATS}i32", places.type, places, places, kept)
        narrow = builder.trunc(packed, ir.VectorType(INT16, VECTOR_FLOATS))
        code.store_elements(narrow, self.lists.places, self.terms.read())
        count = builder.ctpop(builder.bitcast(kept, ir.IntType(VECTOR_FLOATS)))
        self.terms.add(Index(builder, builder.zext(count, INT64)))

    def _append_number(self, source: Index, place: Index) -> None:
        """Without a branch, which would often be guessed wrong: a 0 is stored too, and what follows over it."""
        one, builder = self.one, self.one.builder
        value = one.load(source, one.index(0))
        one.store_elements(value.value, self.lists.values, self.terms.read())
        _store_integer(one, place, INT16, self.lists.places, self.terms.read())
        kept = builder.fcmp_unordered("!=", value.value, value.value.type(None))
        self.terms.add(Index(builder, builder.zext(builder.extract_element(kept, INT32(0)), INT64)))


class _Counter:
    """A number that grows in loops."""

    def __init__(self, code: VectorCode):
        self.builder = code.builder
        self.place = cgutils.alloca_once_value(code.builder, INT64(0))

    def read(self) -> Index:
        return Index(self.builder, self.builder.load(self.place))

    def add(self, number: Index) -> None:
        self.builder.store((self.read() + number).value, self.place)


def _store_integer(one: VectorCode, number: Index, kind: ir.Type, address: Index, index: Index) -> None:
    """Store the low bits of an index as number `index` of those that begin at `address`."""
    low = one.builder.trunc(number.value, kind)
    one.store_elements(one.builder.bitcast(low, ir.VectorType(kind, 1)), address, index)
