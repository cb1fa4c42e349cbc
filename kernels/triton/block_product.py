"""Kernel: y = W x + bias for some rows x, with W in blocks of 16 rows x 1 column, or in picks (row_blocks.py).

    y[n, d, u, s] = bias[d, u, s] + sum of values[block, u] x[n, column] over the blocks of gate g(s) of u's unit group

A gate has a slot s of the output, so that a product can be written where a recurrent kernel reads it: g(s) = s before
the slot EMPTY, which has no gate and gets its bias alone, and s - 1 behind it.

| tensor  | shape                | dtype          |                                                            |
|---------|----------------------|----------------|------------------------------------------------------------|
| x       | [N, C]               | f32, f16, bf16 | read; any strides                                          |
| values  | [NB, 16]             | f32, f16, bf16 | read; PICKED: [NB, 16, 4], with columns [NB, 16, 4, 2]     |
| columns | [NB]                 | int32          | read; PICKED: [NB, 16, 4], read if values are float32      |
| starts  | [D * groups * G + 1] | int32          | read                                                       |
| bias    | [D, H, slots]        | float32        | read if HAS_BIAS; any strides                              |
| y       | [N, D, H, slots]     | float32        | written; any strides                                       |

Grid: (unit groups * D * tiles of ROWS rows of x), unit groups first, so that the rows of x which run at a time are few.
A program takes all gates of a unit group at once, and nothing is synchronised. Sums are float32.

A few rows are multiplied and added one by one: a thread reads a word of x for 4 (or 8) weights. From 16 rows on it is
tl.dot, on tensor cores where x and W are of one 16-bit dtype, whose products are exact. Picks have no columns that a
dot could share: all their rows are multiplied and added, 8 in a program, and a thread reads a word of x for a weight.
"""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# Device code is Triton's language, which only looks like Python to a type checker.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_sparse_rnn.kernels.triton.exchange import INTERPRETED
from triton_sparse_rnn.kernels.triton.steps import UNITS, side_by_side
from triton_sparse_rnn.kernels.triton.words import HIGH, columns_in, widen_word
from triton_sparse_rnn.sparse.row_blocks import VECTORS as _VECTORS
from triton_sparse_rnn.sparse.row_blocks import RowBlocks

LISTS = tl.constexpr(4)  # of stored blocks, that a program works on side by side
VECTORS = tl.constexpr(_VECTORS)  # of picks in an entry


class ProductTile(NamedTuple):
    """How the kernel is compiled."""

    rows: int  # of x in a program
    block_k: int  # stored columns of a list that are multiplied at a time
    num_warps: int
    dot: bool = False  # by tl.dot
    maxnreg: int | None = 128  # registers of a thread; ptxas spills a few words of its own accord if it is not told


# By rows. Not yet measured on a GPU.
TILES = (
    ProductTile(rows=1, block_k=128, num_warps=8),
    ProductTile(rows=2, block_k=64, num_warps=8),
    ProductTile(rows=4, block_k=32, num_warps=8),
    ProductTile(rows=8, block_k=16, num_warps=4, maxnreg=255),
    ProductTile(rows=16, block_k=64, num_warps=4, dot=True),
    ProductTile(rows=32, block_k=64, num_warps=4, dot=True, maxnreg=255),
    ProductTile(rows=64, block_k=32, num_warps=4, dot=True, maxnreg=255),
)
# Of picks, whose columns and words take registers too.
PICKED_TILES = (TILES[0]._replace(block_k=64), *(tile for tile in TILES[1:] if not tile.dot))
_TRANSPOSED_FROM = 32  # rows in a tile: then a column of it is a whole line of the cache, if they lie side by side


def choose_product_tile(rows: int, *, picked: bool = False) -> ProductTile:
    """The smallest tile that holds all rows, or else the largest."""
    tiles = PICKED_TILES if picked else TILES
    return next((tile for tile in tiles if tile.rows >= rows), tiles[-1])


@triton.jit
def stored_lists(starts_ptr, group, GATES: tl.constexpr, EMPTY: tl.constexpr):
    """Where the four lists of stored blocks begin that a program works on side by side, and their lengths: [4], int32.

    They are those of the gates, by slot; a single gate is cut in four.
    """
    slot = tl.arange(0, LISTS)
    if GATES == 1:
        first = tl.load(starts_ptr + group)
        length = tl.load(starts_ptr + group + 1) - first
        part = (length + LISTS - 1) // LISTS
        first += slot * part
        count = tl.minimum(tl.maximum(length - slot * part, 0), part)
    else:
        gate = tl.where(slot > EMPTY, slot - 1, slot)
        has_gate = (slot != EMPTY) & (gate < GATES)
        first = tl.load(starts_ptr + group * GATES + gate, mask=has_gate, other=0)
        count = tl.load(starts_ptr + group * GATES + gate + 1, mask=has_gate, other=0) - first
    return first, count


@triton.jit
def zero_sums(values_ptr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PICKED: tl.constexpr):
    """Sums for each of ROWS rows, [KO, 4, KI, BO, VR]: 4 lists, KO * KI = BLOCK_K columns, BO * VR = 16 units.

    A thread holds VR units in 16 bytes of a column, and a warp 16 units x KI columns x 4 lists. PICKED: [KO, 4, 1, 16,
    4]; a thread holds four weights of a unit, of an entry, and a warp 2 lists.
    """
    VR: tl.constexpr = 128 // values_ptr.dtype.element_ty.primitive_bitwidth
    KI: tl.constexpr = 32 * VR // (LISTS * UNITS)
    sums = ()
    for _ in tl.static_range(ROWS):
        if PICKED:
            sums = sums + (tl.zeros((BLOCK_K // VECTORS, LISTS, 1, UNITS, VECTORS), tl.float32),)
        else:
            sums = sums + (tl.zeros((BLOCK_K // KI, LISTS, KI, UNITS // VR, VR), tl.float32),)
    return sums


@triton.jit
def load_blocks(values_ptr, columns_ptr, first, count, done, padding, shape: tl.constexpr):
    """Load the next blocks of every list, after `done` of them; shape is that of zero_sums.

    Returns weights of that shape, in float32, and columns [KO * 4, KI * BO], which repeat each column BO times, for the
    threads that share it. Both are loaded as matrices, in layouts that fit each other. Behind the last block come zeros
    and the column `padding`.
    """
    KO: tl.constexpr = shape[0]
    KI: tl.constexpr = shape[2]
    BO: tl.constexpr = shape[3]
    first = tl.reshape(tl.broadcast_to(first[None, :], (KO, LISTS)), (KO * LISTS, 1))
    count = tl.reshape(tl.broadcast_to(count[None, :], (KO, LISTS)), (KO * LISTS, 1))
    done += tl.arange(0, KO * LISTS)[:, None] // LISTS * KI
    lane = tl.arange(0, KI * BO)[None, :]
    k = done + lane // BO
    columns = tl.load(columns_ptr + (first + k), mask=k < count, other=padding)
    lane = tl.arange(0, KI * UNITS)[None, :]
    k = done + lane // UNITS
    places = (first + k).to(tl.int64) * UNITS + lane % UNITS
    weights = tl.load(values_ptr + places, mask=k < count, other=0.0).to(tl.float32)
    return tl.reshape(weights, shape), columns


@triton.jit
def load_picks(values_ptr, columns_ptr, first, count, done, padding, shape: tl.constexpr, PORTABLE: tl.constexpr):
    """As load_blocks, the next entries: weights of that shape, and columns [KO * 4, 64], one for each."""
    KO: tl.constexpr = shape[0]
    ENTRY: tl.constexpr = UNITS * VECTORS
    DTYPE: tl.constexpr = values_ptr.dtype.element_ty
    first = tl.reshape(tl.broadcast_to(first[None, :], (KO, LISTS)), (KO * LISTS, 1))
    count = tl.reshape(tl.broadcast_to(count[None, :], (KO, LISTS)), (KO * LISTS, 1))
    k = done + tl.arange(0, KO * LISTS)[:, None] // LISTS
    places = (first + k).to(tl.int64) * ENTRY + tl.arange(0, ENTRY)[None, :]
    if tl.float32 == DTYPE:
        weights = tl.load(values_ptr + places, mask=k < count, other=0.0)
        columns = tl.load(columns_ptr + places, mask=k < count, other=padding)
    else:
        words = tl.load(values_ptr.to(tl.pointer_type(tl.int32)) + places, mask=k < count, other=padding << 16)
        weights = widen_word(words, DTYPE, PORTABLE)
        columns = columns_in(words, HIGH, PORTABLE)
    return tl.reshape(weights, shape), columns


@triton.jit
def load_entries(
    values_ptr, columns_ptr, first, count, done, padding, shape: tl.constexpr,
    PICKED: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """What load_blocks or load_picks returns."""
    if PICKED:
        weights, columns = load_picks(values_ptr, columns_ptr, first, count, done, padding, shape, PORTABLE)
    else:
        weights, columns = load_blocks(values_ptr, columns_ptr, first, count, done, padding, shape)
    return weights, columns


@triton.jit
def multiply_add(sums, weights, words, PICKED: tl.constexpr):
    """Add to a row's sums the products of weights, of the same shape, with words as load_entries returns columns."""
    if PICKED:
        words = tl.reshape(words, weights.shape)
    else:
        words = tl.reshape(words, weights.shape[:4])[:, :, :, :, None]
    return sums + weights * words


@triton.jit
def sum_columns(sums, GATES: tl.constexpr, ROWS: tl.constexpr, PICKED: tl.constexpr):
    """Sum over the columns, for all rows at once: [16, ROWS, SLOTS]."""
    if PICKED:
        parts = ()
        for i in tl.static_range(ROWS):
            parts = parts + (tl.sum(sums[i], axis=4, keep_dims=True),)  # in a thread
        sums = parts
    if ROWS == 1:
        acc = sums[0]
    elif ROWS == 2:
        acc = tl.join(sums[0], sums[1])
    elif ROWS == 4:
        acc = tl.join(tl.join(sums[0], sums[2]), tl.join(sums[1], sums[3]))
    else:
        tl.static_assert(ROWS == 8)
        even = tl.join(tl.join(sums[0], sums[4]), tl.join(sums[2], sums[6]))
        acc = tl.join(even, tl.join(tl.join(sums[1], sums[5]), tl.join(sums[3], sums[7])))
    acc = tl.sum(tl.sum(acc, axis=2), axis=0)  # first in a warp, then over warps
    acc = tl.permute(tl.reshape(acc, (LISTS, UNITS, ROWS)), (1, 2, 0))
    if GATES == 1:
        even, odd = tl.split(tl.reshape(acc, (UNITS, ROWS, 2, 2)))
        even, odd = tl.split(even + odd)
        acc = (even + odd)[:, :, None]
    return acc


@triton.jit
def product_of_rows(
    x_ptr, stride_x_n, stride_x_c, rows, N, C, values_ptr, columns_ptr, starts_ptr, group,
    GATES: tl.constexpr, EMPTY: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    PICKED: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """W x for ROWS rows of x, multiplied and added: [16, ROWS, SLOTS]."""
    first, count = stored_lists(starts_ptr, group, GATES, EMPTY)
    sums = zero_sums(values_ptr, ROWS, BLOCK_K, PICKED)
    ENTRIES: tl.constexpr = BLOCK_K // VECTORS if PICKED else BLOCK_K
    for done in range(0, tl.max(count, axis=0), ENTRIES):
        weights, columns = load_entries(values_ptr, columns_ptr, first, count, done, C, sums[0].shape, PICKED, PORTABLE)
        new = ()
        for i in tl.static_range(ROWS):
            row = tl.minimum(rows + i, N - 1)
            words = tl.load(x_ptr + row * stride_x_n + columns.to(tl.int64) * stride_x_c, mask=columns < C, other=0.0)
            new = new + (multiply_add(sums[i], weights, words.to(tl.float32), PICKED),)
        sums = new
    return sum_columns(sums, GATES, ROWS, PICKED)


@triton.jit
def dot_of_slot(
    x_ptr, stride_x_c, values_ptr, columns_ptr, starts_ptr, group,
    SLOT: tl.constexpr, GATES: tl.constexpr, EMPTY: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    PORTABLE: tl.constexpr,
):  # fmt: skip
    """W x of the gate in one slot: [ROWS, 16]; x_ptr [ROWS, 1] points to the first columns."""
    product = tl.zeros((ROWS, UNITS), tl.float32)
    GATE: tl.constexpr = SLOT - 1 if SLOT > EMPTY else SLOT
    if SLOT != EMPTY and GATE < GATES:
        first = tl.load(starts_ptr + group * GATES + GATE)
        end = tl.load(starts_ptr + group * GATES + GATE + 1)
        for done in range(first, end, BLOCK_K):
            k = done + tl.arange(0, BLOCK_K)
            stored = k < end
            columns = tl.load(columns_ptr + k, mask=stored, other=0).to(tl.int64)
            v = tl.load(x_ptr + columns[None, :] * stride_x_c, mask=stored[None, :], other=0.0)
            places = k.to(tl.int64)[:, None] * UNITS + tl.arange(0, UNITS)[None, :]
            w = tl.load(values_ptr + places, mask=stored[:, None], other=0.0)
            if PORTABLE or v.dtype != w.dtype:  # the interpreter multiplies the bits of bfloat16
                v = v.to(tl.float32)
                w = w.to(tl.float32)
            product = tl.dot(v, w, product, input_precision="ieee")
    return product


@triton.jit
def product_by_dot(
    x_ptr, stride_x_n, stride_x_c, rows, N, values_ptr, columns_ptr, starts_ptr, group,
    GATES: tl.constexpr, SLOTS: tl.constexpr, EMPTY: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    PORTABLE: tl.constexpr,
):  # fmt: skip
    """W x for ROWS rows of x by tl.dot: [16, ROWS, SLOTS]."""
    x_ptr += tl.minimum(rows + tl.arange(0, ROWS), N - 1)[:, None] * stride_x_n
    products = ()
    for slot in tl.static_range(SLOTS):
        product = dot_of_slot(
            x_ptr, stride_x_c, values_ptr, columns_ptr, starts_ptr, group,
            slot, GATES, EMPTY, ROWS, BLOCK_K, PORTABLE,
        )  # fmt: skip
        products = products + (product,)
    return tl.permute(side_by_side(products, SLOTS), (2, 0, 1))


@triton.jit
def unit_group_products(
    x_ptr, stride_x_n, stride_x_c, rows, N, C, values_ptr, columns_ptr, starts_ptr, group,
    GATES: tl.constexpr, SLOTS: tl.constexpr, EMPTY: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    DOT: tl.constexpr, PICKED: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """W x of the gates of a unit group, for the rows of x from `rows` on: [16, ROWS, SLOTS].

    rows: int64; rows past the last are that row again. group: of all directions.
    """
    if DOT:
        product = product_by_dot(
            x_ptr, stride_x_n, stride_x_c, rows, N, values_ptr, columns_ptr, starts_ptr, group,
            GATES, SLOTS, EMPTY, ROWS, BLOCK_K, PORTABLE,
        )  # fmt: skip
    else:
        product = product_of_rows(
            x_ptr, stride_x_n, stride_x_c, rows, N, C, values_ptr, columns_ptr, starts_ptr, group,
            GATES, EMPTY, ROWS, BLOCK_K, PICKED, PORTABLE,
        )  # fmt: skip
    return product


@triton.jit(do_not_specialize=["N"])
def block_product_kernel(
    x_ptr,
    values_ptr,
    columns_ptr,
    starts_ptr,
    bias_ptr,
    y_ptr,
    N,
    C,
    H,
    groups,
    stride_x_n,
    stride_x_c,
    stride_bias_d,
    stride_bias_u,
    stride_bias_s,
    stride_y_n,
    stride_y_d,
    stride_y_u,
    stride_y_s,
    GATES: tl.constexpr,
    SLOTS: tl.constexpr,
    EMPTY: tl.constexpr,
    USED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    PICKED: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    """See the top of the file.

    groups: of all D matrices. SLOTS: 1 or 4, the first USED of which are slots of y. BLOCK_K: columns of a list at a
    time.
    """
    group = tl.program_id(0) % groups
    rows = (tl.program_id(0) // groups).to(tl.int64) * ROWS
    product = unit_group_products(
        x_ptr, stride_x_n, stride_x_c, rows, N, C, values_ptr, columns_ptr, starts_ptr, group,
        GATES, SLOTS, EMPTY, ROWS, BLOCK_K, DOT, PICKED, PORTABLE,
    )  # fmt: skip
    groups_of_one = (H + UNITS - 1) // UNITS
    d = (group // groups_of_one).to(tl.int64)
    unit = (group % groups_of_one).to(tl.int64) * UNITS + tl.arange(0, UNITS)[:, None, None]
    n = rows + tl.arange(0, ROWS)[None, :, None]
    slot = tl.arange(0, SLOTS)[None, None, :]
    mask = (unit < H) & (slot < USED)
    if HAS_BIAS:
        bias = d * stride_bias_d + unit * stride_bias_u + slot * stride_bias_s
        product += tl.load(bias_ptr + bias, mask=mask, other=0.0)
    y = n * stride_y_n + d * stride_y_d + unit * stride_y_u + slot * stride_y_s
    tl.store(y_ptr + y, product, mask=mask & (n < N))


def block_product(x: Tensor, weight: RowBlocks, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Return W x + bias for every row of x.

    Args:
        x: [N, C], float32, float16 or bfloat16; any strides.
        weight: one matrix [G * H, C], with G = 1, 3 or 4.
        bias: [G * H], float32.
        out: [N, G * H], float32, any strides; None for a new tensor.
    """
    G, H = weight.gates, weight.hidden_size
    if out is None:
        out = x.new_empty(len(x), G * H, dtype=torch.float32)
    by_slot = out.unflatten(1, (1, G, H)).transpose(2, 3)
    bias_by_slot = None if bias is None else bias.view(1, G, H).transpose(1, 2)
    _launch(x, weight, bias_by_slot, by_slot, G if G == 3 else 4)
    return out


def project_inputs(x: Tensor, weight: RowBlocks, slot_bias: Tensor | None, sums: Tensor) -> None:
    """Write W_ih x + bias as recurrent kernels read it: r, z and n of a GRU in slots 0, 1 and 3, slot 2 its bias.

    Args:
        x: [N, I], float32, float16 or bfloat16; any strides.
        weight: of all directions.
        slot_bias: [D, H, SLOTS], float32.
        sums: [N, D, H, SLOTS], float32, written; SLOTS is 1 for one gate, else 4.
    """
    _launch(x, weight, slot_bias, sums, 2 if weight.gates == 3 else 4)


def _launch(x: Tensor, weight: RowBlocks, bias: Tensor | None, y: Tensor, empty: int) -> None:
    """Launch with bias [D, H, slots] and y [N, D, H, slots]."""
    N, groups = len(x), weight.groups * weight.directions
    if N == 0:
        return
    tile = choose_product_tile(N, picked=weight.is_picked)
    SLOTS = 1 if weight.gates == 1 else 4
    if tile.rows >= _TRANSPOSED_FROM and x.stride(0) != 1:
        x = x.t().contiguous().t()
    grid = (groups * triton.cdiv(N, tile.rows),)
    block_product_kernel.run(
        x,
        weight.values,
        weight.columns,
        weight.starts,
        bias,
        y,
        N,
        weight.shape[1],
        weight.hidden_size,
        groups,
        *x.stride(),
        *((0, 0, 0) if bias is None else bias.stride()),
        *y.stride(),
        GATES=weight.gates,
        SLOTS=SLOTS,
        EMPTY=empty,
        USED=y.shape[3],
        HAS_BIAS=bias is not None,
        ROWS=tile.rows,
        BLOCK_K=tile.block_k,
        DOT=tile.dot,
        PICKED=weight.is_picked,
        PORTABLE=INTERPRETED,
        grid=grid,
        warmup=False,
        num_warps=tile.num_warps,
        maxnreg=tile.maxnreg,
        num_stages=1,
        enable_fp_fusion=True,
    )
