"""Kernel: the time loop of a recurrent layer whose weights are read again at every step, because they are too many.

    h[s + 1] = cell(sums[t] + W_hh h[s], h[s])                      t = first + s, or T - 1 - first - s in chain 1

The loop is that of resident.py, which says what chains and slices are; but a program owns one unit group, and in every
step it reads its weights, a few columns of all gates at a time, from the L2 cache. A launch of one step (EXCHANGE NONE)
reads h where the caller left it. With FUSED_INPUT that is the only step, and sums are computed in the same launch:

    sums = W_ih x + slot_bias                                       one launch for a step of a stream

| tensor       | shape                  | dtype          |                                                     |
|--------------|------------------------|----------------|-----------------------------------------------------|
| hh_values    | [NB, 16]               | f32, f16, bf16 | read in every step; row_blocks.py has those of      |
| hh_columns   | [NB]                   | int32          | HH_PICKED; read in every step                       |
| hh_starts    | [D * groups * G + 1]   | int32          | read                                                |
| sums         | [N, D, H, SLOTS]       | float32        | read, unless FUSED_INPUT: all but W_hh h            |
| x            | [B, I]                 | any floating   | read if FUSED_INPUT                                 |
| ih_values... | as hh_values...        |                | read if FUSED_INPUT                                 |
| slot_bias    | [D, H, SLOTS]          | float32        | read if FUSED_INPUT: the bias in sums               |
| h_in         | [D, B, H]              | float32        | read                                                |
| c            | [D, B, H]              | float32        | read and written, for an LSTM                       |
| exchange     | [D, S + 1, H + 1, B]   | int32          | written and read if BETWEEN; exchange.py            |
| y            | [N, D * H]             | any floating   | written                                             |
| h_n          | [D, B, H]              | float32        | written; not h_in, which others may still read      |
| starts       | [T]                    | int64          | read if RAGGED: the first row of step t             |
| lengths      | [B]                    | int32          | read if RAGGED: steps of each row, never increasing |
| status       | [1]                    | int32          | set to 1 when a wait has failed                     |

Grid (unit groups * slices, D), groups first. EXCHANGE is NONE for a launch of one step, else BETWEEN, which needs all
programs resident at once and the exchange filled.

A thread reads 16 bytes of weights, which share a column and thus a word of h (four of one unit in picks, each with a
word of its own), and keeps the sums of its columns in registers until the last; nothing but the reduction behind it
needs a barrier.
"""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# Device code is Triton's language, which only looks like Python to a type checker.

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from triton_sparse_rnn.kernels.triton.block_product import ProductTile, choose_product_tile, unit_group_products
from triton_sparse_rnn.kernels.triton.cells import CELLS, GRU, LSTM
from triton_sparse_rnn.kernels.triton.entries import (
    VECTORS,
    load_entries,
    multiply_add,
    stored_lists,
    sum_columns,
    zero_sums,
)
from triton_sparse_rnn.kernels.triton.exchange import BETWEEN, INTERPRETED, NONE, look, publish, wait
from triton_sparse_rnn.kernels.triton.steps import (
    UNITS,
    advance,
    load_state,
    start_of,
    steps_of_slice,
    store_state,
    time_of,
    within_length,
)
from triton_sparse_rnn.sparse.row_blocks import RowBlocks

# For EXCHANGE BETWEEN, where all programs must be resident at once: by rows. Not yet measured on a GPU.
BETWEEN_TILES = (
    ProductTile(rows=1, block_k=64, num_warps=8),
    ProductTile(rows=2, block_k=32, num_warps=8),
    ProductTile(rows=4, block_k=16, num_warps=4, maxnreg=168),
)

_MOST_ROWS = 32  # of a program: the state of more, beside their products, fills the registers
_PACK = 1  # words that a thread reads together


def choose_streamed_tile(rows: int, exchange: int, *, picked: bool = False) -> ProductTile:
    """The smallest tile that holds all rows of the batch, or else the largest."""
    if exchange == NONE.value:
        return choose_product_tile(min(rows, _MOST_ROWS), picked=picked)
    return next((tile for tile in BETWEEN_TILES if tile.rows >= rows), BETWEEN_TILES[-1])


@triton.jit
def products_of_exchange(
    slot_ptr, first_row, B, H, values_ptr, columns_ptr, begins, counts, most, status_ptr, spin_limit,
    GATES: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PICKED: tl.constexpr, PACK: tl.constexpr,
    PORTABLE: tl.constexpr,
):  # fmt: skip
    """W_hh h for ROWS rows of a slot of the exchange, each word read when it is there: [16, ROWS, SLOTS].

    begins, counts: of stored_lists; most: the largest count.
    """
    sums = zero_sums(values_ptr, ROWS, BLOCK_K, PICKED)
    ENTRIES: tl.constexpr = BLOCK_K // VECTORS if PICKED else BLOCK_K
    for done in range(0, most, ENTRIES):
        weights, columns = load_entries(
            values_ptr, columns_ptr, begins, counts, done, H, sums[0].shape, PICKED, PORTABLE
        )
        words = ()
        for i in tl.static_range(ROWS):
            row_ptr = slot_ptr + tl.minimum(first_row + i, B - 1)  # rows past the last are that row again
            words = words + (look(row_ptr, columns, B * 4, PACK, PORTABLE),)
        new = ()
        for i in tl.static_range(ROWS):
            row_ptr = slot_ptr + tl.minimum(first_row + i, B - 1)
            h = wait(words[i], row_ptr, columns, B * 4, status_ptr, spin_limit, PACK, PORTABLE)
            new = new + (multiply_add(sums[i], weights, h, PICKED),)
        sums = new
    return sum_columns(sums, GATES, ROWS, PICKED)


@triton.jit(do_not_specialize=["spin_limit", "first", "S", "T", "B"])
def streamed_steps(
    hh_values_ptr,
    hh_columns_ptr,
    hh_starts_ptr,
    sums_ptr,
    x_ptr,
    ih_values_ptr,
    ih_columns_ptr,
    ih_starts_ptr,
    slot_bias_ptr,
    h_in_ptr,
    c_ptr,
    exchange_ptr,
    y_ptr,
    h_n_ptr,
    starts_ptr,
    lengths_ptr,
    status_ptr,
    spin_limit,
    first,
    S,
    T,
    B,
    H,
    I,
    CELL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    EXCHANGE: tl.constexpr,
    RAGGED: tl.constexpr,
    FUSED_INPUT: tl.constexpr,
    HH_PICKED: tl.constexpr,
    IH_PICKED: tl.constexpr,
    PACK: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    """Run S steps; see the top of the file.

    BLOCK_K: columns of a gate at a time. DOT: by tl.dot, for EXCHANGE NONE. PACK: of exchange.look.
    """
    groups = (H + UNITS - 1) // UNITS
    p = tl.program_id(0) % groups
    first_row = tl.program_id(0) // groups * ROWS
    d = tl.program_id(1)
    D = tl.num_programs(1)
    group = d * groups + p
    GATED: tl.constexpr = CELL == GRU or CELL == LSTM
    SLOTS: tl.constexpr = 4 if GATED else 1
    GATES: tl.constexpr = 3 if CELL == GRU else SLOTS
    HH_EMPTY: tl.constexpr = 3 if CELL == GRU else SLOTS  # the slot of sums to which W_hh adds nothing
    IH_EMPTY: tl.constexpr = 2 if CELL == GRU else SLOTS

    units = p * UNITS + tl.arange(0, UNITS)[:, None]  # [16, 1]
    rows = first_row + tl.arange(0, ROWS)[None, :]  # [1, ROWS]
    mask = (units < H) & (rows < B)
    state = (d * B + rows).to(tl.int64) * H + units  # in h_in, c and h_n
    h, c = load_state(h_in_ptr, c_ptr, state, mask, CELL)
    begin, end, lengths = steps_of_slice(lengths_ptr, first_row, rows, first, S, T, B, d == 1, RAGGED)

    slot_words = (H + 1) * B
    place = units * B + rows  # in a slot
    if EXCHANGE == BETWEEN:
        begins, counts = stored_lists(hh_starts_ptr, group, GATES, HH_EMPTY)
        most = tl.max(counts, axis=0)
        exchange_ptr += (d * (S + 1) + begin).to(tl.int64) * slot_words
        publish(exchange_ptr + place, h, mask)

    t, t_step = time_of(first + begin, T, d == 1)
    N_row = start_of(t, T, starts_ptr, B, RAGGED) + rows  # [1, ROWS]
    slots = tl.arange(0, SLOTS)[None, None, :]
    gate_place = (d * H + units[:, :, None]) * SLOTS + slots  # [16, 1, SLOTS]
    if FUSED_INPUT:
        now = unit_group_products(
            x_ptr, I, 1, first_row.to(tl.int64), B, I, ih_values_ptr, ih_columns_ptr, ih_starts_ptr, group,
            GATES, SLOTS, IH_EMPTY, ROWS, BLOCK_K, DOT, IH_PICKED, PORTABLE,
        )  # fmt: skip
        now += tl.load(slot_bias_ptr + gate_place, mask=units[:, :, None] < H, other=0.0)
    else:
        sums_ptr += gate_place
        wanted = within_length(mask & (begin < end), t, lengths, RAGGED)
        now = tl.load(sums_ptr + N_row[:, :, None] * (D * H * SLOTS), mask=wanted[:, :, None], other=0.0)
    for s in range(begin, end):
        active = within_length(mask, t, lengths, RAGGED)
        # The next step's sums are asked for before this step waits for h.
        next_row = start_of(t + t_step, T, starts_ptr, B, RAGGED) + rows
        later = now
        if EXCHANGE == BETWEEN:
            wanted = within_length(mask & (s + 1 < end), t + t_step, lengths, RAGGED)
            later = tl.load(sums_ptr + next_row[:, :, None] * (D * H * SLOTS), mask=wanted[:, :, None], other=0.0)
            product = products_of_exchange(
                exchange_ptr, first_row, B, H, hh_values_ptr, hh_columns_ptr, begins, counts, most,
                status_ptr, spin_limit, GATES, ROWS, BLOCK_K, HH_PICKED, PACK, PORTABLE,
            )  # fmt: skip
        else:
            product = unit_group_products(
                h_in_ptr + d.to(tl.int64) * B * H, H, 1, first_row.to(tl.int64), B, H,
                hh_values_ptr, hh_columns_ptr, hh_starts_ptr, group,
                GATES, SLOTS, HH_EMPTY, ROWS, BLOCK_K, DOT, HH_PICKED, PORTABLE,
            )  # fmt: skip
        h_new, c_new = advance(product + now, h, c, CELL)
        h = tl.where(active, h_new, h)
        c = tl.where(active, c_new, c)
        if EXCHANGE == BETWEEN:
            exchange_ptr += slot_words
            publish(exchange_ptr + place, h, mask)
        tl.store(y_ptr + N_row * (D * H) + d * H + units, h.to(y_ptr.dtype.element_ty), mask=active)
        now = later
        N_row = next_row
        t += t_step

    store_state(h_n_ptr, c_ptr, state, h, c, mask, CELL)


def launch_streamed(
    mode: str,
    tile: ProductTile,
    exchange_mode: int,
    *,
    weight_hh: RowBlocks,
    sums: Tensor | None,
    h_in: Tensor,
    c: Tensor | None,
    exchange: Tensor | None,
    y: Tensor,
    h_n: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    status: Tensor,
    spin_limit: int,
    first: int,
    steps: int,
    T: int,
    x: Tensor | None = None,
    weight_ih: RowBlocks | None = None,
    slot_bias: Tensor | None = None,
    only_compile: bool = False,
) -> Any:
    """Run steps first, ..., first + steps - 1 of T; returns the compiled kernel, on a GPU.

    The tensors are those at the top of the file, contiguous. starts and lengths are None for a rectangular batch.

    Args:
        mode: of CELLS.
        tile: from choose_streamed_tile, for the rows of h_in; without a dot if one of the weights is picked.
        exchange_mode: exchange.NONE, for one step, or BETWEEN.
        weight_hh: of all directions.
        x, weight_ih, slot_bias: instead of sums, for T = 1.
        only_compile: launch nothing.
    """
    D, B, H = h_in.shape
    grid = (weight_hh.groups * triton.cdiv(B, tile.rows), D)
    ih = (None, None, None) if weight_ih is None else (weight_ih.values, weight_ih.columns, weight_ih.starts)
    return streamed_steps.run(
        weight_hh.values,
        weight_hh.columns,
        weight_hh.starts,
        sums,
        x,
        *ih,
        slot_bias,
        h_in,
        c,
        exchange,
        y,
        h_n,
        starts,
        lengths,
        status,
        spin_limit,
        first,
        steps,
        T,
        B,
        H,
        0 if x is None else x.shape[1],
        CELL=CELLS[mode],
        ROWS=tile.rows,
        BLOCK_K=tile.block_k,
        DOT=tile.dot,
        EXCHANGE=exchange_mode,
        RAGGED=starts is not None,
        FUSED_INPUT=x is not None,
        HH_PICKED=weight_hh.is_picked,
        IH_PICKED=weight_ih is not None and weight_ih.is_picked,
        PACK=_PACK,
        PORTABLE=INTERPRETED,
        grid=grid,
        warmup=only_compile,
        num_warps=tile.num_warps,
        maxnreg=tile.maxnreg,
        num_stages=1,
        enable_fp_fusion=True,
        launch_cooperative_grid=exchange_mode == BETWEEN.value,
    )
