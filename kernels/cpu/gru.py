"""One direction of one GRU layer, from block-sparse weights, in float32.

    r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
    z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
    n = tanh(W_in x + b_in + r * (W_hn h + b_hn))
    h = n + z * (h - n)

| tensor           | shape                  | dtype   |                                                    |
|------------------|------------------------|---------|----------------------------------------------------|
| x                | [N, I]                 | float32 | read; the rows of a step are consecutive           |
| h0               | [D, B, H]              | float32 | read                                               |
| weight_ih        | a BlockMatrix [3 H, I] | float32 | read                                               |
| weight_hh        | a BlockMatrix [3 H, H] | float32 | read                                               |
| bias_ih, bias_hh | [3 H]                  | float32 | read                                               |
| batch_sizes      | [T]                    | int64   | read; rows of each step, never more than before it |
| y                | [N, D H]               | float32 | written                                            |
| h_n              | [D, B, H]              | float32 | written                                            |

All are contiguous. Time, the batch and scratch are the affair of layer.py. Here is what a step does: the kernel takes
the unit groups one after another and finishes BR units in one go. One thread; nothing to synchronise.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

from torch import Tensor

from triton_sparse_rnn.kernels.cpu.block_products import BlockAddresses, block_row_products
from triton_sparse_rnn.kernels.cpu.gates import gru_cell
from triton_sparse_rnn.kernels.cpu.intrinsics import FLOAT_BYTES, compile_kernel
from triton_sparse_rnn.kernels.cpu.layer import run_layer
from triton_sparse_rnn.kernels.cpu.projection import compile_projection
from triton_sparse_rnn.kernels.cpu.vector_code import VectorCode
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix

_GATES = 3
_compiling = threading.Lock()


@functools.cache
def _compile_step(BR: int, BC: int) -> Any:
    """Return the kernel that advances rows by one step, as a numba cfunc, for blocks of BR x BC in weight_hh."""

    def emit(builder: Any, *arguments: Any) -> None:
        code = VectorCode(builder, BR)
        rows, groups, starts, columns, values, bias, projected, h, h_bytes, h_next = map(code.index, arguments)
        matrix = BlockAddresses(starts, columns, values)
        for row, tile in code.row_tiles(rows):
            states = [h + h_bytes * (row + i) for i in range(tile)]
            next_states = [h_next + h_bytes * (row + i) for i in range(tile)]
            inputs = [projected + groups * (_GATES * BR * FLOAT_BYTES) * (row + i) for i in range(tile)]
            with code.loop(code.index(0), groups) as group:
                recurrent = []
                for gate in range(_GATES):
                    start = code.load(bias, groups * gate + group)
                    recurrent.append(block_row_products(code, matrix, BC, group * _GATES + gate, states, start))
                # The sums of all gates are still in registers: the cell needs no buffer and no second pass.
                for i, sums in enumerate(zip(*recurrent, strict=True)):
                    gates = [code.load(inputs[i], group * _GATES + gate) for gate in range(_GATES)]
                    code.store(gru_cell(gates, sums, code.load(states[i], group)), next_states[i], group)

    return compile_kernel(emit)


@functools.cache
def _kernel_addresses(BR: int, BC_ih: int, BC_hh: int) -> tuple[int, int]:
    with _compiling:  # threads that come here together wait for one compilation
        return compile_projection(BR, BC_ih).address, _compile_step(BR, BC_hh).address


def gru_layer(
    x: Tensor,
    h0: Tensor,
    weight_ih: BlockMatrix,
    weight_hh: BlockMatrix,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    batch_sizes: Tensor | None,
    *,
    direction: int,
    y: Tensor,
    h_n: Tensor,
) -> None:
    """Run all steps of one direction of a layer into `y` and `h_n`.

    The table at the top of the file says what each tensor must be; nothing is checked. `unsupported_reason`
    (support.py) must have returned None for the weights.

    Args:
        bias_ih, bias_hh: both or neither.
        batch_sizes: None where every step has B rows.
        direction: 0, or 1 from the last step to the first; a row of the batch then enters, with its h0, at the last
            step it has. Of h0, y and h_n only this direction's part is read or written.
    """
    (N, I), (D, B, H) = x.shape, h0.shape
    if N == 0:
        h_n[direction] = h0[direction]
        return
    (_, BC_ih, BR), BC_hh = weight_ih.values.shape, weight_hh.values.shape[1]
    project, step = _kernel_addresses(BR, BC_ih, BC_hh)
    T = N // B if batch_sizes is None else batch_sizes.shape[0]
    state_bytes = direction * B * H * FLOAT_BYTES
    run_layer(
        N, T, B, I, H, _GATES, BR, BC_ih, BC_hh, direction == 1, project, step,
        weight_ih.starts.data_ptr(), weight_ih.columns.data_ptr(), weight_ih.values.data_ptr(), _address(bias_ih),
        weight_hh.starts.data_ptr(), weight_hh.columns.data_ptr(), weight_hh.values.data_ptr(), _address(bias_hh),
        x.data_ptr(), h0.data_ptr() + state_bytes, _address(batch_sizes),
        y.data_ptr() + direction * H * FLOAT_BYTES, D * H * FLOAT_BYTES, h_n.data_ptr() + state_bytes,
    )  # fmt: skip


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
