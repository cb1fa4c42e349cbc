"""Products of a matrix D of which most numbers are 0, as gate gradients are, with dense matrices X.

    by rows     output[n] = sum over k of D[n, k] X[k]     D X: gradients of states and inputs
    by columns  output[k] = sum over n of D[n, k] X[n]     D^T X: gradients of weights

| tensor | shape                           | dtype   |                                                                |
|--------|---------------------------------|---------|----------------------------------------------------------------|
| D      | [N, K]                          | float32 | read; products with 0 and -0 are left out, those with NaN not  |
| X      | [K, M] or, by columns, [N, M]   | float32 | read, by the kernel that writes panels                         |
| panels | [panels, rows of X, PANEL_COLUMNS] | float32 | written by one kernel, read by the other                    |
| output | [N, M] or, by columns, [K, M]   | float32 | written                                                        |
| lists  | see sparse_lists.py             |         | scratch: the numbers of D that are not 0                       |
| sums   | [sums, PANEL_COLUMNS]           | float32 | scratch                                                        |

Rows of D, X and output are contiguous, at any distance. Panels and scratch begin with a cache line and may hold
anything before.

A panel holds PANEL_COLUMNS columns of X, row after row. TILE_ROWS of its rows, a tile, stay in the first-level cache
while every sum takes from them the rows that it needs. (Read in place, columns of rows that lie a power of two apart
would share a few lines of that cache.) The next tile is fetched meanwhile. A sum is added up in the order of k or n,
whatever the others are, and so does not depend on which rows a call takes by rows.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from numba.core import cgutils

from triton_sparse_rnn.kernels.cpu.gate_gradients.sparse_lists import (
    PANEL_ROW_BYTES,
    TILE_ROWS,
    VECTOR_FLOATS,
    Lists,
    fetch,
    list_of,
    lists_bytes,
    write_lists,
)
from triton_sparse_rnn.kernels.cpu.vector_code import INT16, INT64, Accumulator, Index, VectorCode

PANEL_COLUMNS = PANEL_ROW_BYTES // 4
_VECTORS = PANEL_COLUMNS // VECTOR_FLOATS  # 4: as many multiply-adds as one takes cycles, so that sums do not wait
_ROWS_LISTED = {False: 128, True: 2048}  # of D at a time, by rows and by columns
_LINE_BYTES = 64
_TILE_BYTES = TILE_ROWS * PANEL_ROW_BYTES
_MOST_FETCHED = 64  # lines, for one list: few sums may not need the next tile


class PanelFormat(NamedTuple):
    """What the kernel that writes panels is compiled for."""


class PanelFields(NamedTuple):
    """Sizes and addresses. X may be some of the rows that the panels hold."""

    X: Any
    X_bytes: Any  # between rows
    rows: Any
    columns: Any  # M
    panels: Any  # where the first of these rows goes in the first panel
    panel_bytes: Any  # between panels


class SparseProductFormat(NamedTuple):
    """What the kernel that multiplies is compiled for."""

    by_columns: bool


class SparseProductFields(NamedTuple):
    """Sizes and addresses."""

    D: Any
    D_bytes: Any  # between rows
    columns: Any  # K
    starts: Any  # scratch, as all to sums: see `lay_out_scratch`
    values: Any
    places: Any
    sums: Any
    factors: Any  # FactorFields, one after another
    factor_count: Any


class FactorFields(NamedTuple):
    """An X, and where its product goes."""

    panels: Any
    panel_bytes: Any  # between panels
    columns: Any  # M
    output: Any
    output_bytes: Any  # between rows


class _Rows(NamedTuple):
    """Rows at equal distances."""

    first: Index
    step_bytes: Index

    def address(self, number: Index) -> Index:
        return self.first + self.step_bytes * number


def panels_bytes(rows: int, columns: int) -> int:
    """Return the size of the panels of a matrix."""
    return -(-columns // PANEL_COLUMNS) * rows * PANEL_ROW_BYTES


def lay_out_scratch(by_columns: bool, rows: int, columns: int) -> tuple[tuple[int, int, int, int], int]:
    """Return the offsets of starts, values, places and sums in scratch, and its size, all in bytes.

    Args:
        by_columns: which product.
        rows: of D, the most in a call.
        columns: of D.
    """
    listed = min(rows, _ROWS_LISTED[by_columns])
    sums, tiled = (columns, listed) if by_columns else (listed, columns)
    sizes = *lists_bytes(sums, tiled), sums * PANEL_ROW_BYTES
    starts, values, places, end = itertools.accumulate(-(-size // _LINE_BYTES) * _LINE_BYTES for size in sizes)
    return (0, starts, values, places), end


def emit_panels(builder: Any, format: PanelFormat, address: Any, first: Any, end: Any) -> None:
    """Emit the kernel for panels first, ..., end - 1."""
    code = VectorCode(builder, VECTOR_FLOATS)
    fields = code.fields(PanelFields, code.index(address))
    with code.loop(code.index(first), code.index(end)) as panel:
        source = _Rows(fields.X + panel * PANEL_ROW_BYTES, fields.X_bytes)
        target = _Rows(fields.panels + fields.panel_bytes * panel, code.index(PANEL_ROW_BYTES))
        _copy_rows(code, fields.rows, _bytes_left(fields.columns, panel), source, target, fills=True)


def emit_sparse_product(builder: Any, format: SparseProductFormat, address: Any, first: Any, end: Any) -> None:
    """Emit the kernel for rows first, ..., end - 1 of D. By columns these are all that the product consists of."""
    code = VectorCode(builder, VECTOR_FLOATS)
    fields = code.fields(SparseProductFields, code.index(address))
    lists = Lists(fields.starts, fields.values, fields.places)
    begin, stop, at_once = code.index(first), code.index(end), _ROWS_LISTED[format.by_columns]
    # By columns there are products of no rows too: zeros.
    last = stop.where(">", begin, stop, begin + 1) if format.by_columns else stop
    with code.loop(begin, last, at_once) as row:
        rows = code.smaller(stop - row, code.index(at_once))
        D = fields.D + fields.D_bytes * row
        write_lists(code, format.by_columns, D, fields.D_bytes, rows, fields.columns, lists)
        with code.loop(code.index(0), fields.factor_count) as number:
            factor = code.fields(FactorFields, fields.factors + number * (8 * len(FactorFields._fields)))
            if format.by_columns:
                factor = factor._replace(panels=factor.panels + row * PANEL_ROW_BYTES)
                _sum_up(code, lists, fields.sums, fields.columns, rows, factor, adds=row - begin)
            else:
                factor = factor._replace(output=factor.output + factor.output_bytes * row)
                _sum_up(code, lists, fields.sums, rows, fields.columns, factor, adds=code.index(0))


def _sum_up(
    code: VectorCode, lists: Lists, sums: Index, count: Index, tiled: Index, factor: FactorFields, *, adds: Index
) -> None:
    """Write `count` sums of rows of X, of which there are `tiled`; unless `adds` is 0, add them to what is there."""
    builder = code.builder
    totals = _Rows(sums, code.index(PANEL_ROW_BYTES))
    lines = code.smaller((count + (_TILE_BYTES // _LINE_BYTES - 1)) // count, code.index(_MOST_FETCHED))
    with code.loop(code.index(0), (factor.columns + (PANEL_COLUMNS - 1)) // PANEL_COLUMNS) as panel:
        output = _Rows(factor.output + panel * PANEL_ROW_BYTES, factor.output_bytes)
        bytes_left = _bytes_left(factor.columns, panel)
        cgutils.memset(builder, builder.inttoptr(sums.value, cgutils.voidptr_t), (count * PANEL_ROW_BYTES).value, 0)
        with builder.if_then(cgutils.is_not_null(builder, adds.value)):
            _copy_rows(code, count, bytes_left, output, totals)
        with code.loop(code.index(0), (tiled + (TILE_ROWS - 1)) // TILE_ROWS) as tile:
            rows = factor.panels + factor.panel_bytes * panel + tile * _TILE_BYTES
            with code.loop(code.index(0), count) as number:
                _fetch_lines(code, rows + _TILE_BYTES + number * lines * _LINE_BYTES, lines)
                _add_terms(code, lists, *list_of(code, lists, count, tile, number), rows, totals.address(number))
        _copy_rows(code, count, bytes_left, totals, output)


def _add_terms(code: VectorCode, lists: Lists, first: Index, end: Index, rows: Index, total: Index) -> None:
    """Add the terms of a list to a sum, from the rows of a tile."""
    sums = [Accumulator(code.load(total, code.index(i))) for i in range(_VECTORS)]
    with _rolled_loop(code, first, end) as term:
        value = code.load_broadcast(lists.values, term)
        row = rows + code.load_index(lists.places, term, INT16)
        for i, vector in enumerate(sums):
            vector.add(value * code.load(row, code.index(i)))
    for i, vector in enumerate(sums):
        code.store(vector.read(), total, code.index(i))


def _fetch_lines(code: VectorCode, address: Index, count: Index) -> None:
    with _rolled_loop(code, code.index(0), count) as line:
        fetch(code, address + line * _LINE_BYTES)


@contextlib.contextmanager
def _rolled_loop(code: VectorCode, first: Index, end: Index) -> Iterator[Index]:
    """A loop that LLVM does not unroll: it is short, and where each of several loops ends would be guessed wrong."""
    with code.loop(first, end) as index:
        yield index
        last = code.builder.block
    module = code.builder.module
    wish = module.add_metadata(["llvm.loop.unroll.disable"])
    loop = module.add_metadata([wish, last.name])
    loop.operands = loop, wish  # LLVM tells loops apart by what refers to itself
    last.terminator.set_metadata("llvm.loop", loop)


def _bytes_left(columns: Index, panel: Index) -> Index:
    """How much a row has from the beginning of a panel on."""
    return columns * 4 - panel * PANEL_ROW_BYTES


def _copy_rows(
    code: VectorCode, rows: Index, bytes_left: Index, source: _Rows, target: _Rows, *, fills: bool = False
) -> None:
    """Copy rows of a panel, or as much of each as there is.

    `fills` writes 0 behind that: lanes that nobody reads, but what memory holds can be slow to multiply.
    """
    builder = code.builder
    is_whole = builder.icmp_signed(">=", bytes_left.value, INT64(PANEL_ROW_BYTES))
    with builder.if_else(is_whole) as (whole, part):
        with whole, code.loop(code.index(0), rows) as row:
            for i in range(_VECTORS):
                code.store(code.load(source.address(row), code.index(i)), target.address(row), code.index(i))
        with part, code.loop(code.index(0), rows) as row:
            to, from_ = (builder.inttoptr(each.address(row).value, cgutils.voidptr_t) for each in (target, source))
            if fills:
                cgutils.memset(builder, to, INT64(PANEL_ROW_BYTES), 0)
            cgutils.raw_memcpy(builder, to, from_, bytes_left.value, 1)
