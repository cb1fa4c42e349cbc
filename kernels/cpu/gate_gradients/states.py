"""The cell states of an LSTM from its gates, and whether these are the gates that led to its output.

    c = f c_before + i g
    |o tanh(c) - y| < TOLERANCE and i >= 0          counted

| tensor | shape       | dtype   |                                                                                 |
|--------|-------------|---------|---------------------------------------------------------------------------------|
| steps  | [T]         | int64   | read: PlaceFields of every step, in the order in which the direction takes them |
| gates  | [rows, 4 H] | float32 | read: i, f, g, o                                                                |
| c0     | [B, H]      | float32 | read                                                                            |
| y      | [N, H]      | float32 | read                                                                            |
| c      | [N, H]      | float32 | written, contiguous                                                             |
| right  | [1]         | int64   | added to: how many units passed                                                 |

With i and g exchanged, c is as before; but g has negative numbers, and i none. NaN does not pass.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from triton_sparse_rnn.kernels.cpu.gates import tanh
from triton_sparse_rnn.kernels.cpu.vector_code import FLOAT_BYTES, Index, VectorCode

TOLERANCE = 128 * 2.0**-23  # forward rounds the sums of many steps its own way; wrong gates are off by far more
WIDTH = 16  # units at a time
INT64_BYTES = 8


class PlaceFields(NamedTuple):
    """Where the rows of a step are, in numbers of rows."""

    first: Any  # of N
    rows: Any
    gates: Any  # of the rows of gates
    before: Any  # of N: where those of the step begin that the direction took before
    rows_before: Any  # which were in that step; the states of the others come from c0


STEP_BYTES = INT64_BYTES * len(PlaceFields._fields)


class CellFields(NamedTuple):
    """Sizes and addresses; the distances between rows are in bytes."""

    steps: Any
    units: Any  # H
    gates: Any
    gates_bytes: Any
    c0: Any
    c0_bytes: Any
    y: Any
    y_bytes: Any
    c: Any
    right: Any


class CellFormat(NamedTuple):
    """What the kernel is compiled for: it is always the same."""


def emit_cells(builder: Any, format: CellFormat, address: Any, first: Any, end: Any) -> None:
    """Emit the kernel for steps first, ..., end - 1."""
    code = VectorCode(builder, WIDTH)
    zero = code.index(0)
    fields = code.fields(CellFields, code.index(address))
    with code.loop(code.index(first), code.index(end)) as number:
        step = load_step(code, fields.steps, number)
        with code.loop(zero, step.rows) as row:
            gates = fields.gates + (step.gates + row) * fields.gates_bytes
            c, c_before = cells_of_row(step, row, fields)
            y = fields.y + (step.first + row) * fields.y_bytes
            for part, unit in code.vectors_of(fields.units):
                i, f, g, o = (part.load(gates + (fields.units * gate + unit) * FLOAT_BYTES, zero) for gate in range(4))
                place = unit * FLOAT_BYTES
                new = f * part.load(c_before + place, zero) + i * g
                part.store(new, c + place, zero)
                error = i.where("<", 0.0, math.inf, abs(o * tanh(new) - part.load(y + place, zero)))
                wrong = error.where("<", TOLERANCE, 0.0, part.constant(1.0))
                part.add_to_int64(wrong.count_zeros(), fields.right)


def load_step(code: VectorCode, steps: Index, number: Index) -> PlaceFields:
    return code.fields(PlaceFields, steps + number * STEP_BYTES)


def cells_of_row(step: PlaceFields, row: Index, fields: Any) -> tuple[Index, Index]:
    """Addresses of c after and before a step; `fields` have the units, c, c0 and c0_bytes of CellFields."""
    row_bytes = fields.units * FLOAT_BYTES
    before = fields.c + (step.before + row) * row_bytes
    initial = fields.c0 + row * fields.c0_bytes
    return fields.c + (step.first + row) * row_bytes, row.where("<", step.rows_before, before, initial)
