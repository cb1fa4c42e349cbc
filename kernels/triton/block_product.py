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

from triton_sparse_rnn.kernels.triton.entries import (
    VECTORS,
    load_entries,
    multiply_add,
    stored_lists,
    sum_columns,
    zero_sums,
)
from triton_sparse_rnn.kernels.triton.exchange import INTERPRETED
from triton_sparse_rnn.kernels.triton.steps import UNITS, side_by_side
from triton_sparse_rnn.sparse.row_blocks import RowBlocks


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
PICKED_TILES = tuple(tile._replace(block_k=tile.block_k // 2) for tile in TILES if not tile.dot)
_TRANSPOSED_FROM = 32  # rows in a tile: then a column of it is a whole line of the cache, if they lie side by side


def choose_product_tile(rows: int, *, picked: bool = False) -> ProductTile:
    """The smallest tile that holds all rows, or else the largest."""
    tiles = PICKED_TILES if picked else TILES
    return next((tile for tile in tiles if tile.rows >= rows), tiles[-1])


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
