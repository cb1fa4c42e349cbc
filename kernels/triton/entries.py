"""Device code that reads stored weights a part at a time, blocks or picks (row_blocks.py), and sums their products.

A program works on the lists of a unit group's gates side by side. What it has loaded is multiplied by words of x or h,
which the caller reads, one for each column.
"""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# Device code is Triton's language, which only looks like Python to a type checker.

import triton
import triton.language as tl

from triton_sparse_rnn.kernels.triton.steps import UNITS
from triton_sparse_rnn.kernels.triton.words import HIGH, columns_in, widen_word
from triton_sparse_rnn.sparse.row_blocks import VECTORS as _VECTORS

LISTS = tl.constexpr(4)  # of stored blocks, that a program works on side by side
VECTORS = tl.constexpr(_VECTORS)  # of picks in an entry


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
