"""Kernel: the time loop of a recurrent layer whose weights stay in registers from the first step to the last.

    h[s + 1] = cell(sums[t] + W_hh h[s], h[s])                      t = first + s, or T - 1 - first - s in chain 1

A *chain* is a direction of the layer. Chains, and slices of the batch, do not wait for each other. Program (p, d, i)
owns GROUPS unit groups of 16 units, with all their gates, in chain d, for ROWS rows of the batch. Before the loop it
loads its weights and their columns; in a step it reads the h it needs (exchange.py), multiplies, reduces, applies the
cell and publishes its own h.

| tensor   | shape                           | dtype          |                                                     |
|----------|---------------------------------|----------------|-----------------------------------------------------|
| weights  | [D, P, TILES, KO, R, LANES, 16] | f32, f16, bf16 | read once; packing.py says what lies where          |
| columns  | [D, P, TILES, KO, R, LANES]     | int32          | read once; H stands for padding; picks: packing.py  |
| sums     | [N, D, H, SLOTS]                | float32        | read; what each gate gets besides W_hh h            |
| bias     | [D, H, SLOTS]                   | float32        | read if WAVEFRONT: instead of sums, for d > 0       |
| h_in     | [D, B, H]                       | float32        | read                                                |
| c        | [D, B, H]                       | float32        | read and written, for an LSTM                       |
| exchange | [D, S + 1, H + 1, B]            | int32          | written and read; see exchange.py                   |
| y        | [N, D * H]                      | any floating   | written                                             |
| h_n      | [D, B, H]                       | float32        | written; not h_in, which others may still read      |
| starts   | [T]                             | int64          | read if RAGGED: the first row of step t             |
| lengths  | [B]                             | int32          | read if RAGGED: steps of each row, never increasing |
| status   | [1]                             | int32          | set to 1 when a wait has failed                     |

Grid (P, D, slices), beginning at slice first_slice. How programs hand over h is EXCHANGE: NONE for a launch of one
step, WITHIN where P = 1, BETWEEN otherwise, which needs all programs resident at once and the exchange filled. SLOTS is
4 for GRU and LSTM and 1 for an RNN; a GRU's recurrent products of r, z, n are slots 0, 1, 2, and slot 3 of sums holds
W_in x + b_in.

WAVEFRONT: the chains are layers instead, one above the other, and layer d takes its input from the exchange too: what
layer d - 1 publishes after the same step. So all layers run at once, each as soon as it can:

    layer 0     step 0   step 1   step 2   step 3                 columns 0 ... H - 1: h of this layer in slot s
    layer 1              step 0   step 1   step 2                 columns H + 1 ...: h of the layer below in slot s + 1
    layer 2                       step 0   step 1

Layer 0 has sums [N, 1, H, SLOTS], the others bias [D, H, SLOTS]; y [N, H] is the last layer's. In the exchange the last
layer comes first, so that the one below lies behind.

A thread holds SUB = 4 weights of a column (8 narrow ones), so a word of h that it reads serves as many products. The
32 threads of a warp hold LANES = 2 SUB columns of 16 weights, other warps other gate slots, of which there are R =
GROUPS * SLOTS. Products are summed over a thread's columns, over LANES threads by shuffles, and then the gates of a
unit meet in shared memory.

PICKED: a thread holds SUB = 4 weights of one unit, each with a column and so a word of h of its own, and a warp LANES =
2 entries of 16 units (row_blocks.py). Sixteen threads read h within a bank, four sectors of it. In float32 a weight
takes one and a half registers, as the columns of two tiles share a word; a narrow one takes one, with its column in it.
Each takes one more for the word of h that it waits for.
"""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# Device code is Triton's language, which only looks like Python to a type checker.

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from triton_sparse_rnn.kernels.triton.cells import CELLS, GRU, LSTM
from triton_sparse_rnn.kernels.triton.exchange import BETWEEN, INTERPRETED, NONE, WITHIN, publish
from triton_sparse_rnn.kernels.triton.resident_product import load_picked_tiles, load_tiles, resident_product
from triton_sparse_rnn.kernels.triton.steps import (
    UNITS,
    advance,
    load_state,
    side_by_side,
    start_of,
    steps_of_slice,
    store_state,
    time_of,
    within_length,
)
from triton_sparse_rnn.kernels.triton.tiles import Residency


@triton.jit(do_not_specialize=["spin_limit", "first_slice", "first", "S", "T", "B", "H"])
def resident_steps(
    weights_ptr,
    columns_ptr,
    sums_ptr,
    bias_ptr,
    h_in_ptr,
    c_ptr,
    exchange_ptr,
    y_ptr,
    h_n_ptr,
    starts_ptr,
    lengths_ptr,
    status_ptr,
    spin_limit,
    first_slice,
    first,
    S,
    T,
    B,
    H,
    CELL: tl.constexpr,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    KO: tl.constexpr,
    ROWS: tl.constexpr,
    EXCHANGE: tl.constexpr,
    RAGGED: tl.constexpr,
    WAVEFRONT: tl.constexpr,
    TIED: tl.constexpr,
    PICKED: tl.constexpr,
    AHEAD: tl.constexpr,
    PACK: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    """Run S steps; see the top of the file.

    TIED: all gates of a unit group have the same columns. AHEAD: of resident_product. PACK: of exchange.look.
    """
    p = tl.program_id(0)
    d = tl.program_id(1)
    first_row = (first_slice + tl.program_id(2)) * ROWS
    SLOTS: tl.constexpr = 4 if CELL == GRU or CELL == LSTM else 1
    D = tl.num_programs(1)
    U: tl.constexpr = GROUPS * UNITS
    DTYPE: tl.constexpr = weights_ptr.dtype.element_ty

    program = (d * tl.num_programs(0) + p).to(tl.int64)
    if PICKED:
        weights, columns = load_picked_tiles(weights_ptr, columns_ptr, program, GROUPS * SLOTS, TILES, KO)
    else:
        weights, columns = load_tiles(weights_ptr, columns_ptr, program, GROUPS, SLOTS, TILES, KO, TIED)
    place_in_exchange = d
    sums_row = (D * H).to(tl.int64) * SLOTS  # words from one row of sums to the next
    y_row = D * H
    y_column = d * H
    backwards = d == 1
    if WAVEFRONT:
        place_in_exchange = D - 1 - d
        y_row = H
        y_column = 0
        backwards = False
        sums_row = H.to(tl.int64) * SLOTS
        if d > 0:
            sums_ptr = bias_ptr + d * H * SLOTS
            sums_row = sums_row * 0
    else:
        sums_ptr += d * H * SLOTS
    units = p * U + tl.arange(0, U)[:, None]  # [U, 1]
    rows = first_row + tl.arange(0, ROWS)[None, :]  # [1, ROWS]
    mask = (units < H) & (rows < B)
    state = (d * B + rows).to(tl.int64) * H + units  # in h_in, c and h_n
    h, c = load_state(h_in_ptr, c_ptr, state, mask, CELL)
    begin, end, lengths = steps_of_slice(lengths_ptr, first_row, rows, first, S, T, B, backwards, RAGGED)

    slot_words = (H + 1).to(tl.int64) * B
    place = units * B + rows  # in a slot
    if EXCHANGE != NONE:
        exchange_ptr += (place_in_exchange.to(tl.int64) * (S + 1) + begin) * slot_words
        publish(exchange_ptr + place, h, mask)

    t, t_step = time_of(first + begin, T, backwards)
    N_row = start_of(t, T, starts_ptr, B, RAGGED) + rows  # [1, ROWS]
    sums_ptr += units[:, :, None] * SLOTS + tl.arange(0, SLOTS)[None, None, :]  # [U, 1, SLOTS]
    wanted = within_length(mask & (begin < end), t, lengths, RAGGED)
    now = tl.load(sums_ptr + N_row[:, :, None] * sums_row, mask=wanted[:, :, None], other=0.0)
    for s in range(begin, end):
        active = within_length(mask, t, lengths, RAGGED)
        # The next step's sums are asked for before this step waits for h.
        next_row = start_of(t + t_step, T, starts_ptr, B, RAGGED) + rows
        wanted = within_length(mask & (s + 1 < end), t + t_step, lengths, RAGGED)
        later = tl.load(sums_ptr + next_row[:, :, None] * sums_row, mask=wanted[:, :, None], other=0.0)
        if EXCHANGE == WITHIN:
            tl.debug_barrier()  # what the other threads have published is there behind it
        products = ()
        for r in tl.static_range(ROWS):
            row = tl.minimum(first_row + r, B - 1)  # rows that pad the slice do the last row's work again
            if EXCHANGE == NONE:
                read_ptr = h_in_ptr + (d * B + row).to(tl.int64) * H
            else:
                read_ptr = exchange_ptr + row
            product = resident_product(
                weights, columns, read_ptr, B, H, (S + 1) * (H + 1), status_ptr, spin_limit, DTYPE,
                GROUPS, SLOTS, TILES, AHEAD, EXCHANGE, WAVEFRONT, TIED, PICKED, PACK, PORTABLE,
            )  # fmt: skip
            products = products + (product,)
        gates = side_by_side(products, ROWS) + now  # [U, ROWS, SLOTS]
        h_new, c_new = advance(gates, h, c, CELL)
        h = tl.where(active, h_new, h)
        c = tl.where(active, c_new, c)
        if EXCHANGE != NONE:
            exchange_ptr += slot_words
            publish(exchange_ptr + place, h, mask)
        if WAVEFRONT:
            active = active & (d == D - 1)
        tl.store(y_ptr + N_row * y_row + y_column + units, h.to(y_ptr.dtype.element_ty), mask=active)
        now = later
        N_row = next_row
        t += t_step

    store_state(h_n_ptr, c_ptr, state, h, c, mask, CELL)


def launch_resident(
    mode: str,
    choice: Residency,
    exchange_mode: int,
    *,
    weights: Tensor,
    columns: Tensor | None,
    sums: Tensor,
    bias: Tensor | None,
    h_in: Tensor,
    c: Tensor,
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
    only_compile: bool = False,
) -> Any:
    """Run steps first, ..., first + steps - 1 of T; returns the compiled kernel, on a GPU.

    The tensors are those at the top of the file, contiguous; bias is for a wavefront. Slices that are not resident
    together are launched one after another. starts and lengths are None for a rectangular batch.

    Args:
        mode: of CELLS.
        choice: of tiles.choose_residency.
        exchange_mode: exchange.NONE, for one step, WITHIN for a single program, or BETWEEN.
        only_compile: launch nothing.
    """
    tile, (D, B, H) = choice.tile, h_in.shape
    compiled = None
    for first_slice in range(0, choice.slices, choice.resident_slices):
        compiled = resident_steps.run(
            weights,
            columns,
            sums,
            bias,
            h_in,
            c,
            exchange,
            y,
            h_n,
            starts,
            lengths,
            status,
            spin_limit,
            first_slice,
            first,
            steps,
            T,
            B,
            H,
            CELL=CELLS[mode],
            GROUPS=tile.groups,
            TILES=choice.tiles,
            KO=tile.ko,
            ROWS=tile.rows,
            EXCHANGE=exchange_mode,
            RAGGED=starts is not None,
            WAVEFRONT=bias is not None,
            TIED=tile.tied,
            PICKED=tile.picked,
            AHEAD=min(choice.tiles, tile.ahead or choice.tiles),
            PACK=tile.pack,
            PORTABLE=INTERPRETED,
            grid=(choice.programs, D, min(choice.resident_slices, choice.slices - first_slice)),
            warmup=only_compile,
            num_warps=tile.num_warps,
            maxnreg=tile.registers,  # or else the compiler may spill some for the sake of more programs than there are
            num_stages=1,  # with more, what is waited for may be loaded steps ahead
            enable_fp_fusion=True,
            launch_cooperative_grid=exchange_mode == BETWEEN.value,
        )
    return compiled
