"""Device code that the kernels share: a step's place in the batch, its cell, and sums of several rows side by side."""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# Device code is Triton's language, which only looks like Python to a type checker.

import triton
import triton.language as tl

from triton_sparse_rnn.kernels.triton.cells import GRU, LSTM, RNN_RELU, gru_cell, lstm_cell, rnn_cell
from triton_sparse_rnn.sparse.row_blocks import UNITS as _UNITS

UNITS = tl.constexpr(_UNITS)  # hidden units of a unit group


@triton.jit
def start_of(t, T, starts_ptr, B, RAGGED: tl.constexpr):
    """The first row of step t, int64; of the nearest step where there is no step t."""
    t = tl.minimum(tl.maximum(t, 0), T - 1)
    if RAGGED:
        row = tl.load(starts_ptr + t)
    else:
        row = t.to(tl.int64) * B
    return row


@triton.jit
def advance(gates, h, c, CELL: tl.constexpr):
    """Apply the cell to gates [U, ROWS, SLOTS] and h, c [U, ROWS]; returns the new h and c."""
    if CELL == GRU or CELL == LSTM:
        pairs = tl.reshape(gates, (gates.shape[0], gates.shape[1], 2, 2))
        even, odd = tl.split(pairs)
        gate_0, gate_2 = tl.split(even)
        gate_1, gate_3 = tl.split(odd)
        if CELL == GRU:
            h = gru_cell(gate_0, gate_1, gate_3, gate_2, h)
        else:
            h, c = lstm_cell(gate_0, gate_1, gate_2, gate_3, c)
    else:
        h = rnn_cell(tl.reshape(gates, (gates.shape[0], gates.shape[1])), CELL == RNN_RELU)
    return h, c


@triton.jit
def side_by_side(parts, N: tl.constexpr):
    """Stack N = 1, 2, 4 or 8 tensors [U, SLOTS] to [U, N, SLOTS]."""
    if N == 1:
        out = parts[0][:, None, :]
    elif N == 2:
        out = tl.permute(tl.join(parts[0], parts[1]), (0, 2, 1))
    elif N == 4:
        pairs = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
        out = tl.permute(tl.reshape(pairs, (pairs.shape[0], pairs.shape[1], 4)), (0, 2, 1))
    else:
        tl.static_assert(N == 8)
        low = tl.join(tl.join(parts[0], parts[4]), tl.join(parts[2], parts[6]))
        high = tl.join(tl.join(parts[1], parts[5]), tl.join(parts[3], parts[7]))
        pairs = tl.join(low, high)
        out = tl.permute(tl.reshape(pairs, (pairs.shape[0], pairs.shape[1], 8)), (0, 2, 1))
    return out
