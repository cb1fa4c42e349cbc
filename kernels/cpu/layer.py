"""One direction of one layer, whatever its cell and its blocks: input projection, time loop and batch.

| tensor    | shape                 | dtype   |                                                           |
|-----------|-----------------------|---------|-----------------------------------------------------------|
| projected | [rows, groups, G, BR] | float32 | scratch: W_ih x + b_ih of the rows that come next         |
| h, h_next | [B, padded H]         | float32 | scratch: the state before and after a step, in turn       |
| biases    | [2, G, groups * BR]   | float32 | scratch: b_ih and b_hh where theirs do not fit the blocks |
| padded_x  | [rows, padded I]      | float32 | scratch: rows of x where BC does not divide I             |

All are filled up to whole blocks, so no vector of a kernel needs a mask. What lies beyond I and H is 0 whenever it is
read: a zero weight times NaN would otherwise carry NaN to units that do not depend on it. The other tensors are those
of a launcher (gru.py), which also gives the addresses of two kernels, called as

    project(rows, groups, G, starts, columns, values, bias, x, x_bytes, projected)
    step(rows, groups, starts, columns, values, bias, projected, h, h_bytes, h_next)

Since these alone depend on the cell and the blocks, the function below is compiled once for all.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from triton_sparse_rnn.kernels.cpu.intrinsics import FLOAT_BYTES, call, copy_rows, load_int64, zero_rows

_PROJECTED_BYTES = 1 << 18  # held at a time: read again while in the second-level cache; 64 KB to 1 MB are as fast
_ALIGNMENT_BYTES = 64  # a cache line, so that vectors of scratch do not lie across two


@njit(nogil=True, error_model="numpy")
def run_layer(
    N, T, B, I, H, G, BR, BC_ih, BC_hh, reverse, project, step,
    starts_ih, columns_ih, values_ih, bias_ih, starts_hh, columns_hh, values_hh, bias_hh,
    x, h0, batch_sizes, y, y_bytes, h_n,
):  # fmt: skip
    """From `project` on these are addresses, 0 for None; y_bytes is the distance between rows of y."""
    groups = -(-H // BR)
    I_bytes, H_bytes = I * FLOAT_BYTES, H * FLOAT_BYTES
    gate_bytes = groups * BR * FLOAT_BYTES
    projected_bytes = G * gate_bytes
    x_bytes = -(-I // BC_ih) * BC_ih * FLOAT_BYTES
    h_bytes = max(gate_bytes, -(-H // BC_hh) * BC_hh * FLOAT_BYTES)
    tiles = max(1, _PROJECTED_BYTES // (projected_bytes * 8 * B))
    window = min(N, tiles * 8 * B)

    padded_x_bytes = window * x_bytes if x_bytes > I_bytes else 0
    scratch_bytes = (window + 2) * projected_bytes + 2 * B * h_bytes + padded_x_bytes
    scratch = np.empty(scratch_bytes + _ALIGNMENT_BYTES, np.uint8)
    projected = -(-scratch.ctypes.data // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    h = projected + window * projected_bytes
    h_next = h + B * h_bytes
    biases = h_next + B * h_bytes
    padded_x = biases + 2 * projected_bytes
    zero_rows(2 * B, H_bytes, h_bytes, h, h_bytes)
    bias_ih = _pad_bias(bias_ih, G, H_bytes, gate_bytes, biases)
    bias_hh = _pad_bias(bias_hh, G, H_bytes, gate_bytes, biases + projected_bytes)
    zero_rows(window, I_bytes, x_bytes, padded_x, x_bytes)

    running = 0  # rows of the batch that have begun and not ended
    row = N if reverse else 0  # where the rows of the next step begin or, in reverse, end
    first, end = row, row  # the rows whose projection is held
    for t in range(T):
        rows = B if batch_sizes == 0 else load_int64(batch_sizes, T - 1 - t if reverse else t)
        row -= rows if reverse else 0
        if row < first or row + rows > end:
            first = max(0, row + rows - window) if reverse else row
            end = min(N, first + window)
            inputs = x + first * I_bytes
            if x_bytes > I_bytes:
                copy_rows(end - first, I_bytes, inputs, I_bytes, padded_x, x_bytes)
                inputs = padded_x
            matrix = starts_ih, columns_ih, values_ih
            call(project, (end - first, groups, G, *matrix, bias_ih, inputs, x_bytes, projected))
        if rows > running:
            copy_rows(rows - running, H_bytes, h0 + running * H_bytes, H_bytes, h + running * h_bytes, h_bytes)
        if rows < running:
            copy_rows(running - rows, H_bytes, h + rows * h_bytes, h_bytes, h_n + rows * H_bytes, H_bytes)
        running = rows
        matrix = starts_hh, columns_hh, values_hh
        inputs = projected + (row - first) * projected_bytes
        call(step, (rows, groups, *matrix, bias_hh, inputs, h, h_bytes, h_next))
        zero_rows(rows, H_bytes, gate_bytes, h_next, h_bytes)
        copy_rows(rows, H_bytes, h_next, h_bytes, y + row * y_bytes, y_bytes)
        h, h_next = h_next, h
        row += 0 if reverse else rows
    copy_rows(running, H_bytes, h, h_bytes, h_n, H_bytes)
    return scratch.size  # numba frees an array after its last use, and it does not see that of an address


@njit
def _pad_bias(bias, G, H_bytes, gate_bytes, scratch):
    """Return the address of the bias with gate_bytes between gates; None is 0."""
    if bias != 0 and gate_bytes == H_bytes:
        return bias
    zero_rows(1, 0, G * gate_bytes, scratch, 0)
    if bias != 0:
        copy_rows(G, H_bytes, bias, H_bytes, scratch, gate_bytes)
    return scratch
