"""One time step of the cells, tile by tile, in float32; the equations are those of ops/backends/reference.py.

Each takes what the recurrent product gave, W_hh h + b_hh, with a leading axis of gate slots in PyTorch's order, and the
projected input p = W_ih x + b_ih of each gate.
"""

import triton
import triton.language as tl

# How a kernel knows its cell; by nn.RNNBase.mode in CELLS.
RNN_TANH = tl.constexpr(0)
RNN_RELU = tl.constexpr(1)
GRU = tl.constexpr(2)
LSTM = tl.constexpr(3)
CELLS = {"RNN_TANH": RNN_TANH.value, "RNN_RELU": RNN_RELU.value, "GRU": GRU.value, "LSTM": LSTM.value}


@triton.jit
def tanh(x):
    """2 sigmoid(2 x) - 1, right to 1.2e-7."""
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def rnn_cell(gate, RELU: tl.constexpr):
    """h = act(gate)."""
    if RELU:
        h = tl.where(gate < 0, 0.0, gate)  # not a maximum, which may lose NaN
    else:
        h = tanh(gate)
    return h


@triton.jit
def gru_cell(gate_r, gate_z, projected_n, recurrent_n, h):
    """r = s(gate_r), z = s(gate_z), n = tanh(projected_n + r recurrent_n), h = n + z (h - n)."""
    n = tanh(projected_n + tl.sigmoid(gate_r) * recurrent_n)
    return n + tl.sigmoid(gate_z) * (h - n)


@triton.jit
def lstm_cell(gate_i, gate_f, gate_g, gate_o, c):
    """c = s(f) c + s(i) tanh(g), h = s(o) tanh(c); returns h, c."""
    c = tl.sigmoid(gate_f) * c + tl.sigmoid(gate_i) * tanh(gate_g)
    return tl.sigmoid(gate_o) * tanh(c), c
