"""Kernel: back-propagation through time of an LSTM whose small gate gradients become zero, all steps in one launch.

Every step is that of step.py, which has the equations and the table of tensors, and then

    carried dh = gates W_hh

| tensor    | shape                  | dtype          |                                                             |
|-----------|------------------------|----------------|-------------------------------------------------------------|
| weight    | [4, H, H]              | f32, f16, bf16 | read in every step; rows of units `stride_weight` apart     |
| dh, dc    | [B, H]                 | float32        | read at the first step, written after the last              |
| kept      | [R, T, C + 1, 1]       | int32          | written and read: the exchange, filled; see below           |
| list      | [slices, P, C]         | int32          | scratch if SKIPS: the chunks that a step multiplies         |
| status    | [1]                    | int32          | set to 1 when a wait has failed                             |

Grid (P, slices), beginning at slice first_slice. Program (p, i) owns UNITS hidden units for ROWS rows of the batch, a
slice; it keeps their dh and dc in registers. In a step it computes the gate gradients of its units, writes them where
all can read them, and multiplies those of all units with its columns of W_hh. Slices know nothing of each other.

How programs hand over gate gradients. They are too many to carry their readiness themselves, as h does in exchange.py;
instead each chunk of CHUNK units has a word in the exchange `kept` that does, and says besides whether any of them is
not 0. So with SKIPS a chunk that became zero is neither read nor multiplied.

    writer, all threads                             reader
        store gate gradients                            thread of a word: read it until it is there     look, wait
        barrier of the program                          its fence
        thread of a word: fence, store the word         barrier of the program
                                                        all threads: load gate gradients

Why that is enough, in terms of the PTX memory model: a gate gradient is stored before the barrier that its thread
shares with the thread of the word, which then makes a fence.acq_rel.gpu and a strong store of the word: a release
pattern. Another program's thread reads the word by a strong load, and makes the same fence when it has it: an acquire
pattern, so the two synchronize. It shares a barrier with the threads that load the gate gradient behind it. Causality
order is transitive, so their loads, weak as they are, come after the store, and no other store to that place follows in
the launch, nor does anybody but the owner read there before it. The fence also throws away what the L1 cache held of
the neighbourhood. The copies to shared memory that the compiler makes of these loads (cp.async) are weak loads too, and
are started in the loop over chunks behind the barrier, the only loop that is pipelined.

A word is written once in a launch, so no reader can be late and nothing is swapped. Waits are bounded, as exchange.py
says: a word that never came is read as NaN, and all dh of the slice is NaN from there on. All programs of a launch must
be on the GPU at a time; through_time.py sees to that.

Zeros are counted, and the next step's inputs are loaded, between writing the words and waiting for those of others.

The product has the gates as an axis of batches, of two chunks where there are eight warps: so each warp has its part of
the sum over 4 H, and not all of it for a few columns of the little result.
"""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# Device code is Triton's language, which only looks like Python to a type checker.

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from triton_sparse_rnn.kernels.triton.exchange import INTERPRETED, look, publish, wait
from triton_sparse_rnn.kernels.triton.gate_gradients.step import (
    Saved,
    StepTile,
    Zeroing,
    back_through_step,
    count_zeros,
    is_active,
    kept_chunks,
    load_step,
    load_thresholds,
)
from triton_sparse_rnn.kernels.triton.steps import start_of
from triton_sparse_rnn.kernels.triton.tiles import MOST_REGISTERS

STAGES = {"tf32": 3, "tf32x3": 2}  # loads of chunks under way at a time, by precision. Not yet measured on a GPU


@triton.jit
def fence(PORTABLE: tl.constexpr):
    """Let every thread make a fence of its own between its accesses to memory and those that follow."""
    if not PORTABLE:
        tl.inline_asm_elementwise(
            "fence.acq_rel.gpu; mov.b32 $0, 0;", "=r,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def list_kept(kept, list_ptr, chunk):
    """Write which chunks are not 0, one behind the other; returns how many they are. kept, chunk: [all chunks]."""
    is_kept = kept != 0
    place = tl.cumsum(is_kept.to(tl.int32), axis=0) - 1
    tl.store(list_ptr + place, chunk, mask=is_kept)
    tl.debug_barrier()  # other threads read it
    return tl.sum(is_kept.to(tl.int32), axis=0)


@triton.jit
def multiply_chunks(
    gates_ptr, weight_ptr, list_ptr, count, stride_weight, active_rows, units, H,
    CHUNK: tl.constexpr, SKIPS: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    PORTABLE: tl.constexpr,
):  # fmt: skip
    """gates W_hh for some units: [ROWS, UNITS].

    Args:
        gates_ptr: [ROWS], where gate gradients of each row begin.
        list_ptr, count: which chunks if SKIPS, and how many.
        active_rows: [ROWS], those to read.
        units: [UNITS], columns of the weight.
        PARTS: chunks that are multiplied at a time, 1 or 2.
    """
    batch = tl.arange(0, 4 * PARTS)
    gate = (batch % 4)[:, None, None]
    acc = tl.zeros((4 * PARTS, gates_ptr.shape[0], units.shape[0]), tl.float32)
    for k in tl.range(0, count, PARTS, num_stages=STAGES):
        chunk = k + batch // 4
        is_chunk = chunk < count
        if SKIPS:
            chunk = tl.load(list_ptr + chunk, mask=is_chunk, other=0)
        inner = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
        mask = is_chunk[:, None] & (inner < H)
        gates = tl.load(
            gates_ptr[None, :, None] + gate * H + inner[:, None, :],
            mask=active_rows[None, :, None] & mask[:, None, :],
            other=0.0,
        )  # [4 PARTS, ROWS, CHUNK]
        weight = tl.load(
            weight_ptr + (gate * H + inner[:, :, None]).to(tl.int64) * stride_weight + units[None, None, :],
            mask=mask[:, :, None] & (units < H)[None, None, :],
            other=0.0,
        )  # [4 PARTS, CHUNK, UNITS]
        if PORTABLE:  # the interpreter multiplies the bits of bfloat16
            gates = gates.to(tl.float32)
            weight = weight.to(tl.float32)
        acc = tl.dot(gates, weight, acc, input_precision=PRECISION)
    # Summed by splitting, which spreads the result over all warps: each would hold all of what tl.sum gives.
    acc = tl.permute(acc, (1, 2, 0))
    if PARTS == 2:
        even, odd = tl.split(tl.reshape(acc, (acc.shape[0], acc.shape[1], 4, 2)))
        acc = even + odd
    even, odd = tl.split(tl.reshape(acc, (acc.shape[0], acc.shape[1], 2, 2)))
    even, odd = tl.split(even + odd)
    return even + odd


@triton.jit(do_not_specialize=["spin_limit", "first_slice", "T", "B"])
def gate_gradient_steps(
    gates_ptr, c_ptr, c0_ptr, grad_y_ptr, dh_ptr, dc_ptr, thresholds_ptr, seed_ptr, zeros_ptr, exchange_ptr, starts_ptr,
    lengths_ptr, weight_ptr, list_ptr, status_ptr, spin_limit, first_slice, T, B, H, stride_grad_y, stride_weight,
    ROWS: tl.constexpr, UNITS: tl.constexpr, CHUNK: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr,
    SAMPLE: tl.constexpr, BLOCK_UNITS: tl.constexpr, BLOCK_ROWS: tl.constexpr, REVERSE: tl.constexpr,
    RAGGED: tl.constexpr, SKIPS: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    PORTABLE: tl.constexpr,
):  # fmt: skip
    """Go back through all steps; see the top of the file. WORDS: a power of two, more than the chunks are or as many.

    The order of the steps is the forward's, backwards: from the last to the first, or with REVERSE from the first on.
    """
    p = tl.program_id(0)
    chunks = tl.cdiv(H, CHUNK)
    slice_ = first_slice + tl.program_id(1)
    first_row = slice_ * ROWS
    first_unit = p * UNITS
    units = first_unit + tl.arange(0, UNITS)[None, :]
    rows = first_row + tl.arange(0, ROWS)[:, None]
    mask = (units < H) & (rows < B)
    lengths = T
    longest = T
    if RAGGED:
        lengths = tl.load(lengths_ptr + rows, mask=rows < B, other=0)
        longest = tl.load(lengths_ptr + first_row)
    state = rows.to(tl.int64) * H + units
    dh = tl.load(dh_ptr + state, mask=mask, other=0.0)
    dc = tl.load(dc_ptr + state, mask=mask, other=0.0)
    thresholds, seed = load_thresholds(thresholds_ptr, seed_ptr, GROUP, SAMPLE)

    all_chunks = tl.arange(0, WORDS)
    to_read = tl.minimum(all_chunks, chunks)  # the row behind the last chunk holds 0
    own = p * (UNITS // CHUNK) + tl.arange(0, UNITS // CHUNK)
    exchange_ptr += slice_.to(tl.int64) * T * (chunks + 1)
    if SKIPS:
        list_ptr += (tl.program_id(1) * tl.num_programs(0) + p).to(tl.int64) * chunks
    zeros = tl.zeros((4,), tl.int64)

    t = longest - 1
    t_step = -1
    if REVERSE:
        t = longest * 0
        t_step = 1
    saved = load_step(
        gates_ptr, c_ptr, c0_ptr, grad_y_ptr, stride_grad_y, starts_ptr, lengths, t, T, B, H, rows, units, mask,
        REVERSE, RAGGED,
    )  # fmt: skip
    for _ in tl.range(0, longest, num_stages=1):
        active = is_active(t, T, lengths, mask, RAGGED)
        start = start_of(t, T, starts_ptr, B, RAGGED)
        gates, dc = back_through_step(
            saved, dh, dc, active, thresholds, seed, start, first_row, first_unit, rows, units, H, gates_ptr,
            GROUP, SAMPLE, BLOCK_UNITS, BLOCK_ROWS,
        )  # fmt: skip
        kept = tl.full((UNITS // CHUNK,), 1.0, tl.float32)
        if SKIPS:
            kept = kept_chunks(gates, active, CHUNK)
        slot_ptr = exchange_ptr + t.to(tl.int64) * (chunks + 1)
        tl.debug_barrier()
        fence(PORTABLE)
        publish(slot_ptr + own, kept, own < chunks)

        zeros += count_zeros(gates, active)
        saved = load_step(
            gates_ptr, c_ptr, c0_ptr, grad_y_ptr, stride_grad_y, starts_ptr, lengths, t + t_step, T, B, H, rows, units,
            mask, REVERSE, RAGGED,
        )  # fmt: skip

        words = look(slot_ptr, to_read, 4, 1, PORTABLE)
        words = wait(words, slot_ptr, to_read, 4, status_ptr, spin_limit, 1, PORTABLE)
        fence(PORTABLE)
        tl.debug_barrier()
        count = chunks
        if SKIPS:
            count = list_kept(words, list_ptr, all_chunks)
        row = first_row + tl.arange(0, ROWS)
        active_rows = is_active(t, T, T, row < B, False)
        if RAGGED:
            active_rows = active_rows & (t < tl.load(lengths_ptr + row, mask=row < B, other=0))
        product = multiply_chunks(
            gates_ptr + (start + row) * (4 * H), weight_ptr, list_ptr, count, stride_weight, active_rows,
            first_unit + tl.arange(0, UNITS), H, CHUNK, SKIPS, PARTS, PRECISION, STAGES, PORTABLE,
        )  # fmt: skip
        lost = tl.max((words != words).to(tl.int32), axis=0)
        product = tl.where(lost != 0, float("nan"), product)
        dh = tl.where(active, product, dh)
        t += t_step

    tl.store(dh_ptr + state, dh, mask=mask)
    tl.store(dc_ptr + state, dc, mask=mask)
    tl.atomic_add(zeros_ptr + tl.arange(0, 4), zeros, sem="relaxed")


def launch_steps(
    saved: Saved,
    zeroing: Zeroing,
    tile: StepTile,
    *,
    weight: Tensor,
    scratch: Tensor | None,
    status: Tensor,
    spin_limit: int,
    first_slice: int,
    slices: int,
    T: int,
    reverse: bool,
    precision: str,
    only_compile: bool = False,
) -> Any:
    """Go back through all steps for some slices of the batch; returns the compiled kernel, on a GPU.

    The tensors are those at the top of the files, contiguous but for rows of grad_y and weight.

    Args:
        zeroing: its blocks divide the tile.
        scratch: the list of loop.py; None to multiply chunks that are zero too.
        first_slice, slices: which ones; all their programs must be resident at once.
        reverse: whether the direction goes, forward, from the last step to the first.
        precision: of float32 products: "tf32", or "tf32x3", which is about that of float32.
        only_compile: launch nothing.
    """
    B, H = saved.dc.shape
    return gate_gradient_steps.run(
        *saved, weight, scratch, status, spin_limit, first_slice, T, B, H, saved.grad_y.stride(0), weight.stride(0),
        ROWS=tile.rows, UNITS=tile.units, CHUNK=tile.chunk, WORDS=triton.next_power_of_2(triton.cdiv(H, tile.chunk)),
        GROUP=zeroing.group, SAMPLE=zeroing.sample, BLOCK_UNITS=zeroing.units, BLOCK_ROWS=zeroing.rows,
        REVERSE=reverse, RAGGED=saved.starts is not None, SKIPS=scratch is not None, PARTS=tile.num_warps // 4,
        PRECISION=precision, STAGES=STAGES[precision], PORTABLE=INTERPRETED,
        grid=(triton.cdiv(H, tile.units), slices), warmup=only_compile, num_warps=tile.num_warps,
        maxnreg=MOST_REGISTERS, num_stages=1, enable_fp_fusion=True, launch_cooperative_grid=True,
    )  # fmt: skip
