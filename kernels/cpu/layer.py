"""One direction of one layer, whatever its cell, its blocks and their dtype: input projection, time loop and batch.

| tensor    | shape                | dtype   |                                                                |
|-----------|----------------------|---------|----------------------------------------------------------------|
| x         | [N, I]               | float32 | read; the rows of a step are consecutive                       |
| dense     | [N, G, H]            | float32 | read: W_ih x + b_ih, where W_ih is an ordinary matrix          |
| sizes     | [T]                  | int64   | read: rows of each step, never more than before it             |
| h0, c0    | [D, B, P], [D, B, H] | float32 | read; c0 by an LSTM; P is H or proj_size                       |
| y         | [N, D P]             | float32 | written                                                        |
| h_n, c_n  | [D, B, P], [D, B, H] | float32 | written                                                        |
| projected | [rows, G, padded H]  | float32 | scratch: W_ih x + b_ih of the rows that come next, the window  |
| h, h_next | [B, padded]          | float32 | scratch: the state before and after a step, in turn            |
| c         | [B, padded]          | float32 | scratch: the cell state of an LSTM                             |
| hidden    | [B, padded]          | float32 | scratch: o tanh(c), where W_hr is still to be multiplied by it |

All but scratch are contiguous. Scratch is filled up to whole blocks, so that no vector of a kernel needs a mask, and it
is 0 there whenever it meets a weight: a zero weight times NaN would carry NaN to units that do not depend on it. Only
the kernels know the cell and the blocks, so the function below is compiled once for all; it is kept small, since numba
takes its time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from triton_sparse_rnn.kernels.cpu.intrinsics import (
    allocate,
    close_over,
    copy_rows,
    load_int64,
    load_tuple,
    release,
    run_kernel,
    store_tuple,
    zero_rows,
)
from triton_sparse_rnn.kernels.cpu.matrix import MatrixFields
from triton_sparse_rnn.kernels.cpu.multiply import MATRIX_WORDS, multiply, pack_rows, pad_constants, padded
from triton_sparse_rnn.kernels.cpu.step import StepFields
from triton_sparse_rnn.kernels.cpu.vector_code import FLOAT_BYTES


class LayerFields(NamedTuple):
    """What holds for every call of a direction with as many rows. Scratch is given as offsets in bytes."""

    ih: int  # addresses of MatrixFields of W_ih, W_hh and W_hr
    hh: int
    hr: int
    reverse: int
    has_cell_state: int
    has_projection: int
    x_bytes: int  # of a row, as all that follow
    y_bytes: int
    state_bytes: int  # of h, c and hidden
    projected_bytes: int
    projected_gate_bytes: int
    window: int  # rows that are projected at a time
    projected: int
    h: int
    h_next: int
    c: int
    hidden: int
    packed: int  # inputs of the product that runs
    packed_scales: int
    kernel: int
    scratch_bytes: int


_LAYER_WORDS = len(LayerFields._fields)


def make_run_layer(fingerprint: str) -> Callable[..., bool]:
    """Return the function, for numba to compile.

    Its cache tells functions apart by the constants that they close over: a fingerprint of everything they consist of.
    """

    def run_layer(layer, team, T, N, B, x, dense, sizes, h0, c0, y, h_n, c_n):
        """Run all steps; returns whether there was memory for it.

        `layer` is the address of LayerFields; `team` as for `run_kernel`. From x on, all are addresses, 0 for what
        there is not; h0, c0, y, h_n and c_n are this direction's.
        """
        close_over(fingerprint)
        fields = LayerFields(*load_tuple(layer, _LAYER_WORDS))
        hh = MatrixFields(*load_tuple(fields.hh, MATRIX_WORDS))
        hr = MatrixFields(*load_tuple(fields.hr, MATRIX_WORDS))
        H_bytes, P_bytes, state_bytes = hh.row_bytes, FLOAT_BYTES * hh.inputs, fields.state_bytes
        memory = allocate(fields.scratch_bytes + 64)
        if memory == 0:
            return False
        scratch = memory + 64 - memory % 64  # from the beginning of a cache line
        h, h_next, c, hidden = scratch + fields.h, scratch + fields.h_next, scratch + fields.c, scratch + fields.hidden
        kernel = scratch + fields.kernel
        zero_rows(2 * B, P_bytes, state_bytes, h, state_bytes)  # h_next lies behind h
        zero_rows(B if fields.has_projection else 0, H_bytes, state_bytes, hidden, state_bytes)
        for address in (fields.ih, fields.hh, fields.hr):
            pad_constants(scratch, address)

        running = 0  # rows of the batch that have begun and not ended
        row = N if fields.reverse else 0  # where the rows of the next step begin or, in reverse, end
        first, end, projected = row, row, scratch + fields.projected  # the rows whose projection is held
        if dense:
            first, end, projected = 0, N, dense
        for t in range(T + 1):
            rows = 0 if t == T else load_int64(sizes, T - 1 - t if fields.reverse else t) if sizes else B
            first_row, moved = min(rows, running), abs(rows - running)  # rows that enter or have ended
            h_row, c_row = h + first_row * state_bytes, c + first_row * state_bytes
            h_place, c_place = first_row * P_bytes, first_row * H_bytes
            if rows > running:
                copy_rows(moved, P_bytes, h0 + h_place, P_bytes, h_row, state_bytes)
                copy_rows(moved if fields.has_cell_state else 0, H_bytes, c0 + c_place, H_bytes, c_row, state_bytes)
            else:
                copy_rows(moved, P_bytes, h_row, state_bytes, h_n + h_place, P_bytes)
                copy_rows(moved if fields.has_cell_state else 0, H_bytes, c_row, state_bytes, c_n + c_place, H_bytes)
            running = rows
            if t == T:
                break
            row -= rows if fields.reverse else 0
            if row < first or row + rows > end:
                first = max(0, row + rows - fields.window) if fields.reverse else row
                end = min(N, first + fields.window)
                source = x + first * fields.x_bytes
                multiply(
                    team, scratch, fields, fields.ih, end - first, source, fields.x_bytes,
                    projected, fields.projected_bytes,
                )  # fmt: skip

            output = hidden if fields.has_projection else h_next
            inputs = pack_rows(scratch, fields, hh, rows, h, state_bytes)
            store_tuple(kernel, StepFields(
                fields.hh, padded(scratch, hh.padded_scales, hh.scales), padded(scratch, hh.padded_bias, hh.bias),
                inputs, scratch + fields.packed_scales,
                projected + (row - first) * fields.projected_bytes, fields.projected_bytes, fields.projected_gate_bytes,
                rows, h, c, state_bytes, output,
            ))  # fmt: skip
            run_kernel(team, hh.product, kernel, hh.vectors)
            zero_rows(rows, H_bytes, hh.gate_bytes, output, state_bytes)
            if fields.has_projection:
                multiply(team, scratch, fields, fields.hr, rows, hidden, state_bytes, h_next, state_bytes)
                zero_rows(rows, P_bytes, hr.gate_bytes, h_next, state_bytes)
            copy_rows(rows, P_bytes, h_next, state_bytes, y + row * fields.y_bytes, fields.y_bytes)
            h, h_next = h_next, h
            row += 0 if fields.reverse else rows
        release(memory)
        return True

    return run_layer
