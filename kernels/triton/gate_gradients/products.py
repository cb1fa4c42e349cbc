"""Kernels: the products behind back-propagation through time, with what was zeroed in blocks left out.

    weight_grad[gate, unit, :] = sum of gates[n, gate, unit] x[n, :] over the rows n in which the unit's chunk is kept
    input_grad[n, :]           = sum of gates[n, gate, unit] weight[gate, unit, :] over the chunks that are kept in n

| tensor      | shape            | dtype          |                                                                  |
|-------------|------------------|----------------|------------------------------------------------------------------|
| kept        | [R, T, C + 1, 1] | int32          | read: as step.py leaves it                                       |
| gates       | [N, 4, H]        | f32, f16, bf16 | read                                                             |
| x           | [N, I]           | dtype of gates | read; rows `stride_x` apart                                      |
| weight      | [4, H, I]        | dtype of gates | read; rows of units `stride_weight` apart                        |
| starts      | [T]              | int64          | read if RAGGED: the first row of step t                          |
| row_lists   | [C, N]           | int32          | written, then read: rows in which a chunk is kept                |
| chunk_lists | [R T, C]         | int32          | written, then read: chunks that are kept in ROWS rows of a step  |
| counts      | [C] or [R T]     | int32          | lengths of these lists                                           |
| weight_grad | [4, H, I]        | dtype of gates | written                                                          |
| input_grad  | [N, I]           | dtype of gates | written                                                          |

Lists are made by a program each. Then program (chunk, j) or (rows of a step, j) goes through its list and computes
BLOCK_I columns. Nothing is synchronised within a launch; sums are float32.
"""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# Device code is Triton's language, which only looks like Python to a type checker.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_sparse_rnn.kernels.triton.exchange import INTERPRETED
from triton_sparse_rnn.kernels.triton.gate_gradients.step import StepTile
from triton_sparse_rnn.kernels.triton.steps import start_of
from triton_sparse_rnn.kernels.triton.tiles import MOST_REGISTERS

KEPT_BITS = tl.constexpr(0x3F800000)  # the bits of 1.0; what has not run holds others
STAGES = 3  # loads under way at a time. With all below, not yet measured on a GPU
BLOCK_I = {"tf32": 128, "tf32x3": 32}  # columns of a program, by precision
BLOCK_K = 32  # rows that are multiplied at a time
CHUNKS_AT_A_TIME = 256  # words that list_chunks looks at together
ROWS_AT_A_TIME = 4096  # that list_rows may store together


class Kept(NamedTuple):
    """What the time loop left; see the top of the file."""

    gates: Tensor
    kept: Tensor
    starts: Tensor | None
    tile: StepTile
    B: int


@triton.jit
def rows_of(t, T, starts_ptr, N, B, RAGGED: tl.constexpr):
    """How many rows run at step t."""
    size = B
    if RAGGED:
        size = tl.load(starts_ptr + t + 1, mask=t + 1 < T, other=N) - tl.load(starts_ptr + t)
    return size


@triton.jit(do_not_specialize=["R", "T", "N", "B"])
def list_rows(
    kept_ptr, starts_ptr, list_ptr, counts_ptr, R, T, N, B, C,
    ROWS: tl.constexpr, RAGGED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """List the rows in which a chunk is kept. Grid (C)."""
    chunk = tl.program_id(0)
    list_ptr += chunk.to(tl.int64) * N
    inner = tl.arange(0, ROWS)[None, :]
    count = 0
    for first in range(0, R * T, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        mask = entry < R * T
        words = tl.load(kept_ptr + entry.to(tl.int64) * (C + 1) + chunk, mask=mask, other=0)
        t = tl.minimum(entry, R * T - 1) % T
        first_row = tl.minimum(entry, R * T - 1) // T * ROWS
        size = tl.minimum(tl.maximum(rows_of(t, T, starts_ptr, N, B, RAGGED) - first_row, 0), ROWS).to(tl.int32)
        size = tl.where(words == KEPT_BITS, size, 0)
        place = count + tl.cumsum(size, axis=0) - size
        row = (start_of(t, T, starts_ptr, B, RAGGED) + first_row).to(tl.int32)
        tl.store(list_ptr + place[:, None] + inner, row[:, None] + inner, mask=inner < size[:, None])
        count += tl.sum(size, axis=0)
    tl.store(counts_ptr + chunk, count)


@triton.jit
def list_chunks(kept_ptr, list_ptr, counts_ptr, C, BLOCK: tl.constexpr):
    """List the chunks that are kept in ROWS rows of a step. Grid (R T)."""
    rows = tl.program_id(0).to(tl.int64)
    count = 0
    for first in range(0, C, BLOCK):
        chunk = first + tl.arange(0, BLOCK)
        is_kept = tl.load(kept_ptr + rows * (C + 1) + chunk, mask=chunk < C, other=0) == KEPT_BITS
        place = count + tl.cumsum(is_kept.to(tl.int32), axis=0) - 1
        tl.store(list_ptr + rows * C + place, chunk, mask=is_kept)
        count += tl.sum(is_kept.to(tl.int32), axis=0)
    tl.store(counts_ptr + rows, count)


@triton.jit(do_not_specialize=["N"])
def weight_gradient(
    gates_ptr, x_ptr, list_ptr, counts_ptr, out_ptr, N, H, I, stride_x,
    CHUNK: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    PORTABLE: tl.constexpr,
):  # fmt: skip
    """Grid (C, I / BLOCK_I)."""
    chunk = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inner = tl.arange(0, 4 * CHUNK)  # of all gates
    unit = chunk * CHUNK + inner % CHUNK
    place = inner // CHUNK * H + unit
    list_ptr += chunk.to(tl.int64) * N
    count = tl.load(counts_ptr + chunk)
    acc = tl.zeros((4 * CHUNK, BLOCK_I), tl.float32)
    for k in tl.range(0, count, BLOCK_K, num_stages=STAGES):
        listed = k + tl.arange(0, BLOCK_K)
        row = tl.load(list_ptr + listed, mask=listed < count, other=0).to(tl.int64)
        mask = (listed < count)[:, None]
        gates = tl.load(gates_ptr + row[:, None] * (4 * H) + place[None, :], mask=mask & (unit < H)[None, :], other=0.0)
        x = tl.load(x_ptr + row[:, None] * stride_x + columns[None, :], mask=mask & (columns < I)[None, :], other=0.0)
        if PORTABLE:  # the interpreter multiplies the bits of bfloat16
            gates = gates.to(tl.float32)
            x = x.to(tl.float32)
        acc = tl.dot(tl.trans(gates), x, acc, input_precision=PRECISION)
    out_ptr += place.to(tl.int64)[:, None] * I + columns[None, :]
    tl.store(out_ptr, acc.to(out_ptr.dtype.element_ty), mask=(unit < H)[:, None] & (columns < I)[None, :])


@triton.jit(do_not_specialize=["T", "N", "B"])
def input_gradient(
    gates_ptr, weight_ptr, starts_ptr, list_ptr, counts_ptr, out_ptr, T, N, B, H, I, stride_weight,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_I: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """Grid (R T, I / BLOCK_I)."""
    entry = tl.program_id(0)
    t = entry % T
    row = entry // T * ROWS + tl.arange(0, ROWS)
    active = row < rows_of(t, T, starts_ptr, N, B, RAGGED)
    row = start_of(t, T, starts_ptr, B, RAGGED) + row
    columns = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inner = tl.arange(0, 4 * CHUNK)  # of all gates
    list_ptr += entry.to(tl.int64) * tl.cdiv(H, CHUNK)
    acc = tl.zeros((ROWS, BLOCK_I), tl.float32)
    for k in tl.range(0, tl.load(counts_ptr + entry), num_stages=STAGES):
        unit = tl.load(list_ptr + k) * CHUNK + inner % CHUNK
        place = inner // CHUNK * H + unit
        gates = tl.load(
            gates_ptr + row[:, None] * (4 * H) + place[None, :], mask=active[:, None] & (unit < H)[None, :], other=0.0
        )
        weight = tl.load(
            weight_ptr + place.to(tl.int64)[:, None] * stride_weight + columns[None, :],
            mask=(unit < H)[:, None] & (columns < I)[None, :],
            other=0.0,
        )
        if PORTABLE:
            gates = gates.to(tl.float32)
            weight = weight.to(tl.float32)
        acc = tl.dot(gates, weight, acc, input_precision=PRECISION)
    out_ptr += row[:, None] * I + columns[None, :]
    tl.store(out_ptr, acc.to(out_ptr.dtype.element_ty), mask=active[:, None] & (columns < I)[None, :])


def warps_for(rows: int) -> int:
    """Of a program of input_gradient."""
    return 4 if rows == 16 else 8


def weight_gradients(found: Kept, inputs: list[Tensor], precision: str) -> list[Tensor]:
    """Return gates^T x, [4 H, I], for each x [N, I] of `inputs`, without rows in which a chunk is zero.

    precision: of float32 products: "tf32" or "tf32x3".
    """
    R, T, C = found.kept.shape[0], found.kept.shape[1], found.kept.shape[2] - 1
    N, _, H = found.gates.shape
    rows, counts = (found.kept.new_empty(size) for size in ((C, N), (C,)))
    list_rows[(C,)](
        found.kept, found.starts, rows, counts, R, T, N, found.B, C,
        ROWS=found.tile.rows, RAGGED=found.starts is not None, BLOCK=ROWS_AT_A_TIME // found.tile.rows,
    )  # fmt: skip
    results = []
    for x in inputs:
        I = x.shape[1]
        out = x.new_empty(4 * H, I)
        weight_gradient[(C, triton.cdiv(I, BLOCK_I[precision]))](
            found.gates, x, rows, counts, out, N, H, I, x.stride(0),
            CHUNK=found.tile.chunk, BLOCK_I=BLOCK_I[precision], BLOCK_K=BLOCK_K, PRECISION=precision, STAGES=STAGES,
            PORTABLE=INTERPRETED, num_warps=4, maxnreg=MOST_REGISTERS, enable_fp_fusion=True,
        )  # fmt: skip
        results.append(out)
    return results


def input_gradients(found: Kept, weight: Tensor, precision: str) -> Tensor:
    """Return gates W, [N, I], without chunks that are zero; weight is [4 H, I], its last axis contiguous."""
    R, T, C = found.kept.shape[0], found.kept.shape[1], found.kept.shape[2] - 1
    (N, _, H), I = found.gates.shape, weight.shape[1]
    chunks, counts = (found.kept.new_empty(size) for size in ((R * T, C), (R * T,)))
    list_chunks[(R * T,)](found.kept, chunks, counts, C, BLOCK=CHUNKS_AT_A_TIME)
    out = torch.empty(N, I, dtype=weight.dtype, device=weight.device)
    input_gradient[(R * T, triton.cdiv(I, BLOCK_I[precision]))](
        found.gates, weight, found.starts, chunks, counts, out, T, N, found.B, H, I, weight.stride(0),
        ROWS=found.tile.rows, CHUNK=found.tile.chunk, BLOCK_I=BLOCK_I[precision], RAGGED=found.starts is not None,
        PRECISION=precision, STAGES=STAGES, PORTABLE=INTERPRETED, num_warps=warps_for(found.tile.rows),
        maxnreg=MOST_REGISTERS, enable_fp_fusion=True,
    )  # fmt: skip
    return out
