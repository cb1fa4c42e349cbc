"""Kernel: what the forward of an LSTM computed at every step, again: its gates and its cells.

    gates[n] = (s(i), s(f), tanh(g), s(o)) of sums[n];    c[n] = f c_before + i g, from c0 on, step after step

| tensor  | shape     | dtype          |                                                               |
|---------|-----------|----------------|---------------------------------------------------------------|
| gates   | [N, 4, H] | f32, f16, bf16 | read: W_ih x + W_hh h_before + biases; written: what they are |
| c0      | [B, H]    | float32        | read                                                          |
| c       | [N, H]    | float32        | written                                                       |
| starts  | [T]       | int64          | read if RAGGED: the first row of step t                       |
| lengths | [B]       | int32          | read if RAGGED: steps of each row                             |

Grid (units / BLOCK, B): programs know nothing of each other. c is float32 in any case, since its errors add up; the
gates stay in the dtype of the layer.
"""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# Device code is Triton's language, which only looks like Python to a type checker.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from triton_sparse_rnn.kernels.triton.cells import tanh
from triton_sparse_rnn.kernels.triton.steps import start_of
from triton_sparse_rnn.kernels.triton.tiles import MOST_REGISTERS

BLOCK = 128  # units of a program, which is one warp
STAGES = 4  # steps under way at a time: the next ones are loaded before this one is done


@triton.jit(do_not_specialize=["T", "B"])
def lstm_states(
    gates_ptr, c0_ptr, c_ptr, starts_ptr, lengths_ptr, T, B, H,
    REVERSE: tl.constexpr, RAGGED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Go through the steps of one row of the batch; see the top of the file."""
    units = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(1)
    mask = units < H
    length = T
    if RAGGED:
        length = tl.load(lengths_ptr + b)
    c = tl.load(c0_ptr + b.to(tl.int64) * H + units, mask=mask, other=0.0)
    for s in tl.range(0, length, num_stages=STAGES):
        t = s
        if REVERSE:
            t = length - 1 - s
        row = start_of(t, T, starts_ptr, B, RAGGED) + b
        place = gates_ptr + row * (4 * H) + units
        i = tl.sigmoid(tl.load(place, mask=mask, other=0.0).to(tl.float32))
        f = tl.sigmoid(tl.load(place + H, mask=mask, other=0.0).to(tl.float32))
        g = tanh(tl.load(place + 2 * H, mask=mask, other=0.0).to(tl.float32))
        o = tl.sigmoid(tl.load(place + 3 * H, mask=mask, other=0.0).to(tl.float32))
        c = f * c + i * g
        gates_dtype = gates_ptr.dtype.element_ty
        tl.store(place, i.to(gates_dtype), mask=mask)
        tl.store(place + H, f.to(gates_dtype), mask=mask)
        tl.store(place + 2 * H, g.to(gates_dtype), mask=mask)
        tl.store(place + 3 * H, o.to(gates_dtype), mask=mask)
        tl.store(c_ptr + row * H + units, c, mask=mask)


def activate_gates(
    gates: Tensor, c0: Tensor, c: Tensor, starts: Tensor | None, lengths: Tensor | None, T: int, *, reverse: bool
) -> None:
    """Write gates, in place, and c; the tensors are those at the top of the file, contiguous.

    Args:
        starts, lengths: None for a rectangular batch.
        T: steps.
        reverse: whether the direction goes from the last step to the first.
    """
    B, H = c0.shape
    grid = (triton.cdiv(H, BLOCK), B)
    lstm_states[grid](
        gates, c0, c, starts, lengths, T, B, H,
        REVERSE=reverse, RAGGED=starts is not None, BLOCK=BLOCK, STAGES=STAGES, num_warps=1,
        maxnreg=MOST_REGISTERS, enable_fp_fusion=True,
    )  # fmt: skip
