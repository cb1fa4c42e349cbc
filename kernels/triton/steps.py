"""Device code that the time loops share: which steps a slice of the batch has, its state and sums, and the cell."""

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
def steps_of_slice(lengths_ptr, first_row, rows, first, S, T, B, backwards, RAGGED: tl.constexpr):
    """Which of the S steps from `first` on a slice of the batch has: begin and end of them, and lengths [1, ROWS].

    In a ragged batch it has nothing to do while none of its rows is active, which its first row is longest.
    """
    begin = 0
    end = S
    lengths = rows
    if RAGGED:
        lengths = tl.load(lengths_ptr + rows, mask=rows < B, other=0)
        longest = tl.load(lengths_ptr + first_row)
        if backwards:
            begin = tl.minimum(S, tl.maximum(T - longest - first, 0))
        else:
            end = tl.minimum(S, tl.maximum(longest - first, 0))
    return begin, end, lengths


@triton.jit
def time_of(step, T, backwards):
    """The time t of a step, and what the next one's is more."""
    t = step
    t_step = 1
    if backwards:
        t = T - 1 - step
        t_step = -1
    return t, t_step


@triton.jit
def within_length(mask, t, lengths, RAGGED: tl.constexpr):
    """Where of mask [U, ROWS] the rows of the batch have a step t, which is a step."""
    if RAGGED:
        mask = mask & (t < lengths)
    return mask


@triton.jit
def load_state(h_in_ptr, c_ptr, state, mask, CELL: tl.constexpr):
    """h and c [U, ROWS]; h twice where the cell has no c."""
    h = tl.load(h_in_ptr + state, mask=mask, other=0.0)
    c = h
    if CELL == LSTM:
        c = tl.load(c_ptr + state, mask=mask, other=0.0)
    return h, c


@triton.jit
def store_state(h_n_ptr, c_ptr, state, h, c, mask, CELL: tl.constexpr):
    """Write h and c [U, ROWS] after the last step."""
    tl.store(h_n_ptr + state, h, mask=mask)
    if CELL == LSTM:
        # Threads may hold the same cell: each has loaded it, one stores it. A slice without a step in this launch has
        # no barrier in between, and needs none: what is stored is what is there.
        tl.store(c_ptr + state, c, mask=mask)


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
