"""Device code of resident.py: a program's weights in registers, and their product with h in a step.

packing.py says in which order weights and columns are stored.
"""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# Device code is Triton's language, which only looks like Python to a type checker.

import triton
import triton.language as tl

from triton_sparse_rnn.kernels.triton.exchange import BETWEEN, NONE, look, wait
from triton_sparse_rnn.kernels.triton.steps import UNITS
from triton_sparse_rnn.kernels.triton.words import HIGH, LOW, WHOLE, columns_in, widen, widen_word


@triton.jit
def load_tiles(
    weights_ptr, columns_ptr, program, GROUPS: tl.constexpr, SLOTS: tl.constexpr, TILES: tl.constexpr,
    KO: tl.constexpr, TIED: tl.constexpr,
):  # fmt: skip
    """Load a program's weights and columns: TILES tensors of each, of the shapes that `resident_product` gives.

    They are loaded as matrices, of which a warp takes a row: its threads 16 bytes of weights each, and one column. So
    both come in layouts that fit each other, and are only named anew by the reshape.
    """
    R: tl.constexpr = GROUPS * SLOTS
    CR: tl.constexpr = GROUPS if TIED else R
    SUB: tl.constexpr = 4 if weights_ptr.dtype.element_ty == tl.float32 else 8
    LANES: tl.constexpr = 2 * SUB
    weights = ()
    columns = ()
    w_place = tl.arange(0, R * KO)[:, None] * (32 * SUB) + tl.arange(0, 32 * SUB)[None, :]
    c_place = tl.arange(0, CR * KO)[:, None] * LANES + tl.arange(0, 32)[None, :] // (UNITS // SUB)
    for i in tl.static_range(TILES):
        tile = program * TILES + i
        w = tl.load(weights_ptr + tile * (R * KO * 32 * SUB) + w_place)
        c = tl.load(columns_ptr + tile * (CR * KO * LANES) + c_place)
        if TIED:
            weights = weights + (tl.reshape(w, (R, KO, LANES, UNITS // SUB, SUB)),)
            columns = columns + (tl.reshape(c, (KO, LANES, UNITS // SUB)),)
        else:
            weights = weights + (tl.reshape(w, (KO, R, LANES, UNITS // SUB, SUB)),)
            columns = columns + (tl.reshape(c, (KO, R, LANES, UNITS // SUB)),)
    return weights, columns


@triton.jit
def load_picked_tiles(
    weights_ptr, columns_ptr, program, R: tl.constexpr, TILES: tl.constexpr, KO: tl.constexpr
):  # fmt: skip
    """Load a program's picks: TILES matrices of weights [KO * R, 128], and half as many of two columns in each word.

    Narrow weights have their columns beside them, in the same words, and no others. A warp takes a row, two entries of
    16 units, and a thread the four vectors of one.
    """
    weights = ()
    columns = ()
    words_ptr = weights_ptr
    if weights_ptr.dtype.element_ty != tl.float32:
        words_ptr = weights_ptr.to(tl.pointer_type(tl.int32))
    place = tl.arange(0, R * KO)[:, None] * 128 + tl.arange(0, 128)[None, :]
    for i in tl.static_range(TILES):
        w = tl.load(words_ptr + (program * TILES + i) * (R * KO * 128) + place)
        weights = weights + (w,)
    if weights_ptr.dtype.element_ty == tl.float32:
        PAIRS: tl.constexpr = (TILES + 1) // 2
        for i in tl.static_range(PAIRS):
            c = tl.load(columns_ptr + (program * PAIRS + i) * (R * KO * 128) + place)
            columns = columns + (c,)
    return weights, columns


@triton.constexpr_function
def half_of(tile, picked, dtype):
    """Where in their words the columns of a tile are."""
    if not picked:
        return WHOLE.value
    return LOW.value if dtype == tl.float32 and tile % 2 == 0 else HIGH.value


@triton.jit
def columns_of(weights, columns, i: tl.constexpr, PICKED: tl.constexpr):
    """The words in which the columns of a tile are."""
    if not PICKED:
        out = columns[i]
    elif weights[i].dtype == tl.float32:
        out = columns[i // 2]
    else:
        out = weights[i]
    return out


@triton.jit
def look_at_tile(
    weights, columns, i: tl.constexpr, read_ptr, B, H, below, dtype: tl.constexpr, EXCHANGE: tl.constexpr,
    WAVEFRONT: tl.constexpr, PICKED: tl.constexpr, PACK: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """Ask for the words of h that a tile multiplies; arguments as in `resident_product`."""
    names = columns_of(weights, columns, i, PICKED)
    HALF: tl.constexpr = half_of(i, PICKED, dtype)
    if EXCHANGE == BETWEEN:
        words = look(read_ptr, names, B * 4, PACK, PORTABLE, HALF, WAVEFRONT, H, below)
    else:
        names = columns_in(names, HALF, PORTABLE)
        if EXCHANGE == NONE:
            words = tl.load(read_ptr + names, mask=names < H, other=0.0)
        else:
            words = tl.load(read_ptr + names * B)
    return words


@triton.jit
def resident_product(
    weights, columns, read_ptr, B, H, below, status_ptr, spin_limit, dtype: tl.constexpr,
    GROUPS: tl.constexpr, SLOTS: tl.constexpr, TILES: tl.constexpr, AHEAD: tl.constexpr, EXCHANGE: tl.constexpr,
    WAVEFRONT: tl.constexpr, TIED: tl.constexpr, PICKED: tl.constexpr, PACK: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """W_hh h for one row of the batch: [U, SLOTS].

    weights[i] [KO, GROUPS * SLOTS, LANES, 16 / SUB, SUB] and columns[i] [KO, GROUPS * SLOTS, LANES, 16 / SUB]; the last
    two axes of weights are the 16 units, SUB of them in a thread, and columns are repeated along the first of the two.
    TIED: [SLOTS, KO, ...] and [KO, ...]. PICKED: all [KO * GROUPS * SLOTS, 2 * 16 * 4], of load_picked_tiles.
    dtype: of a weight. AHEAD: tiles whose words are asked for before those of the first are waited for.
    """
    words = ()
    for i in tl.static_range(AHEAD):
        words = words + (look_at_tile(
            weights, columns, i, read_ptr, B, H, below, dtype, EXCHANGE, WAVEFRONT, PICKED, PACK, PORTABLE
        ),)  # fmt: skip
    acc = tl.zeros(weights[0].shape, tl.float32)
    for i in tl.static_range(TILES):
        if EXCHANGE == BETWEEN:
            v = wait(
                words[i], read_ptr, columns_of(weights, columns, i, PICKED), B * 4, status_ptr, spin_limit,
                PACK, PORTABLE, half_of(i, PICKED, dtype), WAVEFRONT, H, below,
            )  # fmt: skip
        else:
            v = words[i].to(tl.float32, bitcast=True)
        if PICKED:
            acc += widen_word(weights[i], dtype, PORTABLE) * v
        else:
            acc += widen(weights[i], PORTABLE) * tl.expand_dims(v, -1)  # TIED: v is broadcast to all slots
        if i + AHEAD < TILES:
            words = words + (look_at_tile(
                weights, columns, i + AHEAD, read_ptr, B, H, below, dtype, EXCHANGE, WAVEFRONT, PICKED, PACK, PORTABLE
            ),)  # fmt: skip
    if PICKED:
        acc = tl.reshape(acc, (acc.shape[0] // (GROUPS * SLOTS), GROUPS * SLOTS, 2, UNITS, 4))
        acc = tl.sum(tl.sum(tl.sum(acc, axis=4), axis=0), axis=1)  # [GROUPS * SLOTS, 16]
    else:
        KO_AXIS: tl.constexpr = 1 if TIED else 0
        acc = tl.sum(tl.sum(acc, axis=KO_AXIS), axis=1)  # [GROUPS * SLOTS, 16 / SUB, SUB]
    if SLOTS == 1:
        acc = tl.reshape(acc, (GROUPS * UNITS, 1))
    else:
        acc = tl.permute(tl.reshape(acc, (GROUPS, SLOTS, UNITS)), (0, 2, 1))
        acc = tl.reshape(acc, (GROUPS * UNITS, SLOTS))
    return acc
