"""One time step of every cell: the recurrent product and, on its sums, the cell.

    RNN   h = act(p + W h + b)
    GRU   r = s(p_r + W_r h + b_r)   z = s(p_z + W_z h + b_z)   n = tanh(p_n + r (W_n h + b_n))   h = n + z (h - n)
    LSTM  i, f, o = s(p + W h + b)   g = tanh(p_g + W_g h + b_g)   c = f c + i g   output = o tanh(c)

| tensor    | shape                               | dtype           |                                     |
|-----------|-------------------------------------|-----------------|-------------------------------------|
| W         | a BlockMatrix [G H, columns of h]   | layout.dtype    | read                                |
| scales    | [G, padded H]                       | float32         | read, where W is int8               |
| bias      | [G, padded H]                       | float32         | read                                |
| projected | [rows, G, padded H]                 | float32         | read: p = W_ih x + b_ih             |
| inputs    | [rows, padded columns of h]         | float32 or int8 | read: h, as pack.py leaves it       |
| h         | [rows, padded H]                    | float32         | read, by a GRU                      |
| c         | [rows, padded H]                    | float32         | read and written, by an LSTM        |
| output    | [rows, padded H]                    | float32         | written: h after the step           |

The kernel takes a few vectors of units, sums up all their gates, and finishes them before it goes on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from triton_sparse_rnn.kernels.cpu.gate_sums import gate_sums
from triton_sparse_rnn.kernels.cpu.gates import Gates, gru_cell, lstm_cell, relu, tanh
from triton_sparse_rnn.kernels.cpu.matrix import MatrixFields
from triton_sparse_rnn.kernels.cpu.stored_weights import BlockFormat
from triton_sparse_rnn.kernels.cpu.vector_code import Index, Vector, VectorCode
from triton_sparse_rnn.sparse.layer_config import GATES

_CELLS = 8  # of vectors of units, run after their sums: each waits for its own results, several fill the time


class StepFields(NamedTuple):
    """Addresses and sizes. Distances between rows are in bytes."""

    matrix: Any  # address of MatrixFields
    scales: Any
    bias: Any
    inputs: Any
    input_scales: Any
    projected: Any
    projected_bytes: Any
    projected_gate_bytes: Any
    rows: Any
    h: Any
    c: Any
    state_bytes: Any  # between rows of h, c and output
    output: Any


class StepFormat(NamedTuple):
    """What the kernel is compiled for."""

    mode: str  # nn.RNNBase.mode
    layout: BlockFormat  # of W


class _OnDemand:
    """Vectors of the gates, each emitted where a cell asks for it, once: its function fills gaps of the next sums."""

    def __init__(self, emit: Callable[[int], Vector]):
        self._emit = emit

    def __getitem__(self, gate: int) -> Vector:
        return self._emit(gate)


def emit_step(builder: Any, format: StepFormat, address: Any, first: Any, end: Any) -> None:
    """Emit the kernel for vectors first, ..., end - 1 of the units."""
    mode, layout = format
    gates = GATES[mode]
    code = VectorCode(builder, layout.width)
    fields = code.fields(StepFields, code.index(address))
    matrix = code.fields(MatrixFields, fields.matrix)
    for row, rows in code.row_tiles(fields.rows, layout.tile_rows):
        if rows == 1 and not layout.quantized:  # reading weights takes longer than cells do: these fill its gaps
            one = VectorCode(builder, layout.width, by_reciprocal=True)  # a row of many is in no hurry
            with one.loop(one.index(first), one.index(end)) as vector:
                sum_up = functools.partial(_gate_sum, one, layout, matrix, fields, row, vector)
                _advance(one, mode, fields, row, vector, _OnDemand(sum_up))
            continue
        together = max(1, _CELLS // rows)
        sums = code.stack(together * gates * rows)
        with code.loop(code.index(first), code.index(end), together) as chunk:
            chunk_end = code.smaller(chunk + together, code.index(end))
            with code.loop(chunk, chunk_end) as vector, code.loop(code.index(0), matrix.gates) as gate:
                place = ((vector - chunk) * gates + gate) * rows
                for i, total in enumerate(gate_sums(code, layout, matrix, fields, row, rows, vector, gate)):
                    code.store(total, sums, place + i)
            with code.loop(chunk, chunk_end) as vector:
                for i in range(rows):
                    recurrent = [code.load(sums, ((vector - chunk) * gates + gate) * rows + i) for gate in range(gates)]
                    _advance(code, mode, fields, row + i, vector, recurrent)


def _gate_sum(
    code: VectorCode,
    layout: BlockFormat,
    matrix: MatrixFields,
    fields: StepFields,
    row: Index,
    vector: Index,
    gate: int,
) -> Vector:
    """The recurrent product of a gate, in one row."""
    return gate_sums(code, layout, matrix, fields, row, 1, vector, code.index(gate))[0]


def _advance(code: VectorCode, mode: str, fields: StepFields, row: Index, vector: Index, recurrent: Gates) -> None:
    """Run the cell of a vector of units in one row."""
    start = fields.projected + fields.projected_bytes * row
    projected = _OnDemand(lambda gate: code.load(start + fields.projected_gate_bytes * gate, vector))
    state = fields.state_bytes * row
    if mode == "GRU":
        h = gru_cell(projected, recurrent, code.load(fields.h + state, vector))
    elif mode == "LSTM":
        h, c = lstm_cell(projected, recurrent, code.load(fields.c + state, vector))
        code.store(c, fields.c + state, vector)
    else:
        h = {"RNN_TANH": tanh, "RNN_RELU": relu}[mode](projected[0] + recurrent[0])
    code.store(h, fields.output + state, vector)
