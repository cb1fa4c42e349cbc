"""Kernel: a step of back-propagation through an LSTM, in which small gradients of the linear gates become zero.

    dh    = grad_y[t] + carried dh
    dc    = carried dc + dh o (1 - tanh(c)^2)
    gates = (dc g i (1 - i),  dc c_before f (1 - f),  dc i (1 - g^2),  dh tanh(c) o (1 - o))
    gates = those that are not small, 0 for the others, which are counted
    carried dc = dc f

in one pass over the step. Carried dh, gates W_hh, is the product that follows: loop.py has both together.

| tensor     | shape             | dtype          |                                                               |
|------------|-------------------|----------------|---------------------------------------------------------------|
| gates      | [N, 4, H]         | f32, f16, bf16 | read: i, f, g, o; written in their place: their gradients     |
| c          | [N, H]            | float32        | read                                                          |
| c0         | [B, H]            | float32        | read                                                          |
| grad_y     | [N, H]            | f32, f16, bf16 | read; rows `stride_grad_y` apart                              |
| dh, dc     | [B, H]            | float32        | read; dc is written                                           |
| thresholds | [4] or [1]        | float32        | read unless DENSE: of each gate (ELEMENTS), or of all         |
| seed       | [1]               | int64          | read if SAMPLE                                                |
| zeros      | [4]               | int64          | what is exactly 0 is added to it, by gate                     |
| kept       | [R, T, C + 1, 1]  | int32          | written: the bits of 1.0 where a chunk of a step is not all 0 |
| starts     | [T]               | int64          | read if RAGGED: the first row of step t                       |
| lengths    | [B]               | int32          | read if RAGGED: steps of each row, never increasing           |

Grid (H / UNITS, B / ROWS): a program takes a tile of ROWS consecutive rows of the batch and UNITS hidden units with all
their gates. A chunk is CHUNK units of such a tile: of these there are R = B / ROWS and C = H / CHUNK. Nothing is
synchronised. Everything is float32; gates are rounded to their dtype after they have been judged, and counted after
that. What is small, and which random numbers decide, is defined by contract.py and random.py in
triton_sparse_rnn/gate_gradients.
"""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# Device code is Triton's language, which only looks like Python to a type checker.

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from triton_sparse_rnn.kernels.triton.cells import tanh
from triton_sparse_rnn.kernels.triton.exchange import publish
from triton_sparse_rnn.kernels.triton.steps import start_of
from triton_sparse_rnn.kernels.triton.tiles import MOST_REGISTERS

# What is judged.
DENSE = tl.constexpr(0)  # nothing: all gate gradients stay
ELEMENTS = tl.constexpr(1)
BLOCKS = tl.constexpr(2)  # of units x 4 gates x rows, by their root mean square


class Zeroing(NamedTuple):
    """What becomes zero, as kernels are compiled for it."""

    group: int  # DENSE, ELEMENTS or BLOCKS
    sample: bool = False  # small groups are kept with probability size / threshold, at the size of the threshold
    units: int = 1  # of a block, a power of two, as rows
    rows: int = 1


class StepTile(NamedTuple):
    """What a program takes, as kernels are compiled for it; all are powers of two."""

    rows: int
    units: int
    chunk: int  # units that are multiplied at a time, or skipped
    num_warps: int


class Saved(NamedTuple):
    """What a step is computed from; see the top of the file."""

    gates: Tensor
    c: Tensor
    c0: Tensor
    grad_y: Tensor
    dh: Tensor
    dc: Tensor
    thresholds: Tensor | None
    seed: Tensor
    zeros: Tensor
    kept: Tensor
    starts: Tensor | None
    lengths: Tensor | None


@triton.jit
def hash32(x):
    """The hash of random.py, of uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def uniform(seed, n, j):
    """u(seed, n, j) of random.py, float32 in (0, 1); all are uint32."""
    bits = hash32(hash32((seed ^ n) + 0x9E3779B9) + j) >> 9
    return (bits.to(tl.int32).to(tl.float32) + 0.5) * (1.0 / 8388608)


@triton.jit
def gate_gradients(saved, dh, dc):
    """Return the gradients of the linear gates i, f, g, o, and dc of the step before.

    Args:
        saved: of load_step.
        dh: all of it, that of y too.
        dc: carried.
    """
    i, f, g, o, c, c_before, _ = saved
    tanh_c = tanh(c)
    dc += dh * o * (1 - tanh_c * tanh_c)
    gates = (dc * g * i * (1 - i), dc * c_before * f * (1 - f), dc * i * (1 - g * g), dh * tanh_c * o * (1 - o))
    return gates, dc * f


@triton.jit
def load_thresholds(thresholds_ptr, seed_ptr, GROUP: tl.constexpr, SAMPLE: tl.constexpr):
    """Return the thresholds of the four gates, and the seed."""
    thresholds = (0.0, 0.0, 0.0, 0.0)
    if GROUP == ELEMENTS:
        thresholds = (
            tl.load(thresholds_ptr), tl.load(thresholds_ptr + 1), tl.load(thresholds_ptr + 2),
            tl.load(thresholds_ptr + 3),
        )  # fmt: skip
    elif GROUP == BLOCKS:
        threshold = tl.load(thresholds_ptr)
        thresholds = (threshold, threshold, threshold, threshold)
    seed = 0
    if GROUP != DENSE and SAMPLE:
        seed = tl.load(seed_ptr).to(tl.uint32)
    return thresholds, seed


@triton.jit
def zero_small_elements(gates, thresholds, seed, n, units, H, SAMPLE: tl.constexpr):
    """Zero gate gradients under the threshold of their gate; n [ROWS, 1] are their rows."""
    out = ()
    for gate in tl.static_range(4):
        x = gates[gate]
        threshold = thresholds[gate]
        small = tl.abs(x) < threshold
        instead = tl.zeros_like(x)
        if SAMPLE:
            u = uniform(seed, n.to(tl.uint32), (gate * H + units).to(tl.uint32))
            instead = tl.where(u * threshold < tl.abs(x), tl.where(x < 0, -threshold, threshold), 0.0)
        out = out + (tl.where(small, instead, x),)
    return out


@triton.jit
def of_blocks(x, UNITS_OF_BLOCK: tl.constexpr, ROWS_OF_BLOCK: tl.constexpr):
    """Sum over blocks: [ROWS, UNITS] -> [rows of blocks, 1, columns of blocks, 1]."""
    ROWS: tl.constexpr = x.shape[0] // ROWS_OF_BLOCK
    UNITS: tl.constexpr = x.shape[1] // UNITS_OF_BLOCK
    blocks = tl.reshape(x, (ROWS, ROWS_OF_BLOCK, UNITS, UNITS_OF_BLOCK))
    return tl.sum(tl.sum(blocks, axis=3, keep_dims=True), axis=1, keep_dims=True)


@triton.jit
def to_elements(blocks, like, UNITS_OF_BLOCK: tl.constexpr, ROWS_OF_BLOCK: tl.constexpr):
    """Give every element of [ROWS, UNITS] what its block has."""
    shape: tl.constexpr = (blocks.shape[0], ROWS_OF_BLOCK, blocks.shape[2], UNITS_OF_BLOCK)
    return tl.reshape(tl.broadcast_to(blocks, shape), like.shape)


@triton.jit
def zero_small_blocks(
    gates, active, threshold, seed, start, first_row, first_unit, SAMPLE: tl.constexpr,
    BLOCK_UNITS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Zero blocks whose root mean square is under the threshold.

    start: the first row of the step; first_row, first_unit: of the tile, multiples of the sizes of a block.
    """
    squares = gates[0] * gates[0] + gates[1] * gates[1] + gates[2] * gates[2] + gates[3] * gates[3]
    squares = of_blocks(tl.where(active, squares, 0.0), BLOCK_UNITS, BLOCK_ROWS)
    count = of_blocks(active.to(tl.float32), BLOCK_UNITS, BLOCK_ROWS) * 4
    size = tl.sqrt(squares / tl.maximum(count, 1.0))
    factor = tl.where(size < threshold, 0.0, 1.0)
    if SAMPLE:
        BLOCKS_DOWN: tl.constexpr = squares.shape[0]
        BLOCKS_ACROSS: tl.constexpr = squares.shape[2]
        down = start + first_row + tl.arange(0, BLOCKS_DOWN)[:, None, None, None] * BLOCK_ROWS
        across = first_unit // BLOCK_UNITS + tl.arange(0, BLOCKS_ACROSS)[None, None, :, None]
        u = uniform(seed, down.to(tl.uint32), across.to(tl.uint32))
        chosen = (size < threshold) & (u * threshold < size)
        factor = tl.where(chosen, threshold / tl.where(chosen, size, 1.0), factor)
    factor = to_elements(factor, gates[0], BLOCK_UNITS, BLOCK_ROWS)
    out = ()
    for gate in tl.static_range(4):
        out = out + (tl.where(factor == 0, 0.0, gates[gate] * factor),)
    return out


@triton.jit
def is_active(t, T, lengths, mask, RAGGED: tl.constexpr):
    """Which of a tile's elements run at step t, which need not be a step."""
    active = mask & (t >= 0) & (t < T)
    if RAGGED:
        active = active & (t < lengths)
    return active


@triton.jit
def load_step(
    gates_ptr, c_ptr, c0_ptr, grad_y_ptr, stride_grad_y, starts_ptr, lengths, t, T, B, H, rows, units, mask,
    REVERSE: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Return i, f, g, o, c, c before step t and grad_y of a tile [ROWS, UNITS], float32; 0 where it does not run."""
    active = is_active(t, T, lengths, mask, RAGGED)
    row = start_of(t, T, starts_ptr, B, RAGGED) + rows
    gates_ptr += row * (4 * H) + units
    before = t + 1 if REVERSE else t - 1
    has_before = active & is_active(before, T, lengths, mask, RAGGED)
    row_before = start_of(before, T, starts_ptr, B, RAGGED) + rows
    c_before = tl.load(c_ptr + row_before * H + units, mask=has_before, other=0.0)
    c_first = tl.load(c0_ptr + rows.to(tl.int64) * H + units, mask=active & (has_before == 0), other=0.0)
    return (
        tl.load(gates_ptr, mask=active, other=0.0).to(tl.float32),
        tl.load(gates_ptr + H, mask=active, other=0.0).to(tl.float32),
        tl.load(gates_ptr + 2 * H, mask=active, other=0.0).to(tl.float32),
        tl.load(gates_ptr + 3 * H, mask=active, other=0.0).to(tl.float32),
        tl.load(c_ptr + row * H + units, mask=active, other=0.0),
        tl.where(has_before, c_before, c_first),
        tl.load(grad_y_ptr + row * stride_grad_y + units, mask=active, other=0.0).to(tl.float32),
    )


@triton.jit
def back_through_step(
    saved, dh, dc, active, thresholds, seed, start, first_row, first_unit, rows, units, H, gates_ptr,
    GROUP: tl.constexpr, SAMPLE: tl.constexpr, BLOCK_UNITS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Compute a step of a tile and write its gate gradients; returns them, as rounded, and dc of the step before.

    start: the first row of the step; first_row, first_unit: of the tile; dh, dc: carried.
    """
    gates, dc_before = gate_gradients(saved, dh + saved[6], dc)
    if GROUP == ELEMENTS:
        gates = zero_small_elements(gates, thresholds, seed, start + rows, units, H, SAMPLE)
    elif GROUP == BLOCKS:
        gates = zero_small_blocks(
            gates, active, thresholds[0], seed, start, first_row, first_unit, SAMPLE, BLOCK_UNITS, BLOCK_ROWS
        )
    gates_ptr += (start + rows) * (4 * H) + units
    rounded = ()
    for gate in tl.static_range(4):
        x = gates[gate].to(gates_ptr.dtype.element_ty)
        tl.store(gates_ptr + gate * H, x, mask=active)
        rounded = rounded + (x.to(tl.float32),)
    return rounded, tl.where(active, dc_before, dc)


@triton.jit
def kept_chunks(gates, active, CHUNK: tl.constexpr):
    """Which chunks of a tile are not all 0: [UNITS / CHUNK], float32 1 or 0. NaN is not 0."""
    kept = active & ((gates[0] != 0) | (gates[1] != 0) | (gates[2] != 0) | (gates[3] != 0))
    CHUNKS: tl.constexpr = kept.shape[1] // CHUNK
    kept = tl.reshape(tl.max(kept.to(tl.int32), axis=0), (CHUNKS, CHUNK))
    return tl.max(kept, axis=1).to(tl.float32)


@triton.jit
def count_zeros(gates, active):
    """How many of each gate's gradients are 0: [4], int64. A tile has less than 2^16 of each."""
    counts = tl.zeros_like(gates[0]).to(tl.int64)
    for gate in tl.static_range(4):
        counts += (active & (gates[gate] == 0)).to(tl.int64) << (16 * gate)
    counts = tl.sum(tl.ravel(counts), axis=0)  # all four in one
    return (counts >> (16 * tl.arange(0, 4))) & 0xFFFF


@triton.jit(do_not_specialize=["t", "T", "B"])
def gate_gradient_step(
    gates_ptr, c_ptr, c0_ptr, grad_y_ptr, dh_ptr, dc_ptr, thresholds_ptr, seed_ptr, zeros_ptr, kept_ptr, starts_ptr,
    lengths_ptr, t, T, B, H, stride_grad_y,
    ROWS: tl.constexpr, UNITS: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, SAMPLE: tl.constexpr,
    BLOCK_UNITS: tl.constexpr, BLOCK_ROWS: tl.constexpr, REVERSE: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Go back through step t; see the top of the file."""
    first_unit = tl.program_id(0) * UNITS
    first_row = tl.program_id(1) * ROWS
    units = first_unit + tl.arange(0, UNITS)[None, :]
    rows = first_row + tl.arange(0, ROWS)[:, None]
    mask = (units < H) & (rows < B)
    lengths = T
    if RAGGED:
        lengths = tl.load(lengths_ptr + rows, mask=rows < B, other=0)
    active = is_active(t, T, lengths, mask, RAGGED)
    thresholds, seed = load_thresholds(thresholds_ptr, seed_ptr, GROUP, SAMPLE)
    saved = load_step(
        gates_ptr, c_ptr, c0_ptr, grad_y_ptr, stride_grad_y, starts_ptr, lengths, t, T, B, H, rows, units, mask,
        REVERSE, RAGGED,
    )  # fmt: skip
    state = rows.to(tl.int64) * H + units
    dh = tl.load(dh_ptr + state, mask=active, other=0.0)
    dc = tl.load(dc_ptr + state, mask=active, other=0.0)
    gates, dc = back_through_step(
        saved, dh, dc, active, thresholds, seed, start_of(t, T, starts_ptr, B, RAGGED), first_row, first_unit, rows,
        units, H, gates_ptr, GROUP, SAMPLE, BLOCK_UNITS, BLOCK_ROWS,
    )  # fmt: skip
    tl.store(dc_ptr + state, dc, mask=active)
    tl.atomic_add(zeros_ptr + tl.arange(0, 4), count_zeros(gates, active), sem="relaxed")
    chunk = first_unit // CHUNK + tl.arange(0, UNITS // CHUNK)
    chunks = tl.cdiv(H, CHUNK)
    kept_ptr += (tl.program_id(1).to(tl.int64) * T + t) * (chunks + 1)
    publish(kept_ptr + chunk, kept_chunks(gates, active, CHUNK), chunk < chunks)


def launch_step(saved: Saved, zeroing: Zeroing, tile: StepTile, t: int, T: int, *, reverse: bool) -> None:
    """Go back through step t of T; the tensors are those at the top of the file, contiguous but for grad_y.

    Args:
        zeroing: its blocks divide the tile.
        reverse: whether the direction goes, forward, from the last step to the first.
    """
    B, H = saved.dc.shape
    grid = (triton.cdiv(H, tile.units), triton.cdiv(B, tile.rows))
    gate_gradient_step[grid](
        *saved, t, T, B, H, saved.grad_y.stride(0),
        ROWS=tile.rows, UNITS=tile.units, CHUNK=tile.chunk, GROUP=zeroing.group, SAMPLE=zeroing.sample,
        BLOCK_UNITS=zeroing.units, BLOCK_ROWS=zeroing.rows, REVERSE=reverse, RAGGED=saved.starts is not None,
        num_warps=tile.num_warps, maxnreg=MOST_REGISTERS, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
