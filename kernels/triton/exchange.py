r"""How the programs of a persistent kernel hand each other h: the values themselves say when they are there.

A layer's time loop runs inside one launch. Each program owns some hidden units, and at every step it needs the h that
all the others have computed one step before. They meet in a buffer in the GPU's memory, the *exchange*, which has a
slot for each step; in practice it is read and written in the L2 cache.

    exchange [D, S + 1, H + 1, B], int32: the bits of float32 h, for D chains, S steps of this launch and B rows of the
    batch; filled with SENTINEL by an earlier launch on the same stream, so that the filling needs no fence either

    slot        0            1            2                 S
             +------+     +------+     +------+         +------+
    unit 0   |  h0  |  -->|  h1  |  -->|  h2  | --> ... |  hS  |     written by program 0
         1   |      |  \ /|      |  \ /|      |         |      |     written by program 0
         2   |      |   X |      |   X |      |         |      |     written by program 1
         3   |      |  / \|      |  / \|      |         |      |     written by program 1
             +------+     +------+     +------+         +------+
    row H    | 0000 |     | 0000 |     | 0000 |         | 0000 |     never written: zeros from the beginning

    step s, program p:
        read      the words of slot s that its stored columns name, again and again until none is SENTINEL
        compute   h of its own units
        write     them into slot s + 1, each word once in the whole launch

Who writes what: only the owner of a unit writes its words, once each; slot 0 with the h it was given, slot s + 1 after
step s. Who reads what: any program of the chain, any word of slot s, at step s. (Where the chains are layers, a program
also reads slot s + 1 of the layer below; see WAVEFRONT in resident.py.)

All programs must be on the GPU at a time, or one waits for another that cannot begin. time_loop.py sees to that before
the launch, and the launch is a cooperative one, which the driver refuses if it were not so.

Why that is enough, without a fence, a flag or a barrier between programs: what is handed over is one 32-bit word, and
nothing else is ever concluded from having read it. A word is either SENTINEL or its final value, since a 32-bit strong
access is never torn (PTX memory model: single-copy atomicity holds between strong operations; a plain ld or st is weak,
so neither side uses one: reads are ld.relaxed, and the st.wt of `publish` is STG.STRONG in machine code, which
residency.py checks). No word is written twice in a launch, so no reader can be late either, and no buffer is
swapped. Program p may be several steps behind or ahead of another; what it waits for is exactly what it multiplies.

The pattern that says "not yet" is a NaN, 0xFFFFFFFF, so h must never have these bits: every NaN is written as NAN,
0x7FC00000. That holds for slot 0 too, so a caller's h0 may hold any bits.

A reader does not wait for ever: after spin_limit polls it writes FAILED to `status` and goes on with what it has, which
is the sentinel, a NaN. From there NaN spreads along the stored weights, as any NaN does. Others that wait look at
`status` from time to time and give up as well, so a launch always ends; the host raises at its next call
(time_loop.py).

Rows of a batch that have ended are handed over like any other, with the h they ended with, so nobody has to know which
rows of others are still running.

A column of padding names row H. It would be shorter to let it name column 0 with a weight of 0, but 0 times infinity is
NaN.

A launch of one step needs none of this (EXCHANGE NONE: h is read where the caller left it). Where a single program
holds a layer (WITHIN), it uses the same buffer, but nobody waits for a word: its threads meet at a barrier.
"""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# Device code is Triton's language, which only looks like Python to a type checker.

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_sparse_rnn.kernels.triton.words import HIGH, LOW, WHOLE, columns_in

SENTINEL = tl.constexpr(-1)
NAN = tl.constexpr(0x7FC00000)
FAILED = tl.constexpr(1)

# How the programs of a launch hand over h.
NONE = tl.constexpr(0)  # one step: not at all
WITHIN = tl.constexpr(1)  # one program holds the layer
BETWEEN = tl.constexpr(2)

INTERPRETED: bool = triton.knobs.runtime.interpret  # by TRITON_INTERPRET, when kernels are decorated


@triton.constexpr_function
def _load_assembly(n, half, has_below, more=()):
    """Load n words. Outputs, columns, base addresses, strides, H and `below` are n operands each.

    more: lines between columns and addresses.
    """
    take = {WHOLE.value: "mov.b32 {}, {};", LOW.value: "and.b32 {}, {}, 65535;", HIGH.value: "shr.u32 {}, {}, 16;"}
    lines = [take[half].format(f"column{i}", f"${n + i}") for i in range(n)]
    for i in range(n if has_below else 0):
        lines += [f"setp.gt.u32 lower, column{i}, ${4 * n};", f"@lower add.u32 column{i}, column{i}, ${5 * n};"]
    lines += more
    lines += [f"mad.wide.u32 address{i}, column{i}, ${3 * n}, ${2 * n};" for i in range(n)]
    return lines + [f"ld.relaxed.gpu.global.b32 ${i}, [address{i}];" for i in range(n)]


@triton.constexpr_function
def _declarations(n):
    return f".reg .b64 address<{n}>; .reg .b32 column<{n}>; .reg .pred lower;"


@triton.constexpr_function
def _look_assembly(n, half, has_below):
    return "\n".join(["{", _declarations(n), *_load_assembly(n, half, has_below), "}"])


@triton.constexpr_function
def _wait_assembly(n, half, has_below):
    """Load n words again until none is the sentinel; `status` is looked at every 64 polls.

    Behind the operands of _load_assembly come the words as they were, addresses of status, and spin limits.
    """
    words, status, limit = 6 * n, f"${7 * n}", f"${8 * n}"
    lines = ["{", ".reg .pred waiting, again;", ".reg .b32 polls, flag;", _declarations(n)]
    lines += ["mov.b32 polls, 0;", *(f"mov.b32 ${i}, ${words + i};" for i in range(n))]
    lines += ["CHECK:", f"setp.eq.b32 waiting, $0, {SENTINEL.value};"]
    lines += [f"setp.eq.or.b32 waiting, ${i}, {SENTINEL.value}, waiting;" for i in range(1, n)]
    lines += ["@!waiting bra DONE;", "add.u32 polls, polls, 1;"]
    lines += [f"setp.ge.u32 again, polls, {limit};", "@again bra FAIL;"]
    lines += ["and.b32 flag, polls, 63;", "setp.ne.u32 again, flag, 0;", "@again bra LOAD;"]
    lines += [f"ld.relaxed.sys.global.b32 flag, [{status}];", "setp.ne.u32 again, flag, 0;", "@again bra DONE;"]
    # Addresses of another look are the same, but a compiler that knew it would keep all those of the first until here.
    anew = ["shr.u32 flag, polls, 31;", *(f"add.u32 column{i}, column{i}, flag;" for i in range(n))]
    lines += ["LOAD:", *_load_assembly(n, half, has_below, anew), "bra CHECK;"]
    lines += ["FAIL:", f"st.relaxed.sys.global.b32 [{status}], {FAILED.value};", "DONE:", "}"]
    return "\n".join(lines)


@triton.constexpr_function
def _constraints(n, more):
    """Of the operands: outputs, which are early since inputs are read after them; those of _load_assembly, and more."""
    return ",".join(["=&r"] * n + [letter for letter in "rlrrr" + more for _ in range(n)])


@triton.jit
def rows_in_slot(columns, H, below, HALF: tl.constexpr, HAS_BELOW: tl.constexpr):
    """What `look` and `wait` read, for the interpreter, which knows no assembly: rows of the slot, int64."""
    rows = columns_in(columns, HALF, True).to(tl.int64)
    if HAS_BELOW:
        rows = tl.where(rows > H, rows + below, rows)
    return rows


@triton.jit
def look(
    base_ptr, columns, stride_bytes, PACK: tl.constexpr, PORTABLE: tl.constexpr,
    HALF: tl.constexpr = WHOLE, HAS_BELOW: tl.constexpr = False, H=0, below=0,
):  # fmt: skip
    """Read words of a slot once, without waiting: `wait` goes on from there.

    Looking at all words before waiting for the first of them lets their journeys through the L2 cache overlap.

    Args:
        base_ptr: where row 0 of the slot has the batch row that is read.
        columns: int32, any shape: rows of the slot.
        stride_bytes: int32, from one row to the next.
        PACK: words that a thread reads together, a number that divides those it has.
        PORTABLE: for the interpreter, which knows no assembly.
        HALF: where the column is in its word, WHOLE, LOW or HIGH.
        HAS_BELOW, H, below: columns from H + 1 on are `below` rows further on, int32.
    """
    if PORTABLE:
        places = rows_in_slot(columns, H, below, HALF, HAS_BELOW) * (stride_bytes // 4)
        words = tl.load(base_ptr + places, volatile=True)
    else:
        words = tl.inline_asm_elementwise(
            _look_assembly(PACK, HALF, HAS_BELOW),
            _constraints(PACK, ""),
            [columns, base_ptr, stride_bytes, H, below],
            dtype=tl.int32,
            is_pure=False,
            pack=PACK,
        )
    return words


@triton.jit
def wait(
    words, base_ptr, columns, stride_bytes, status_ptr, spin_limit, PACK: tl.constexpr, PORTABLE: tl.constexpr,
    HALF: tl.constexpr = WHOLE, HAS_BELOW: tl.constexpr = False, H=0, below=0,
):  # fmt: skip
    """Read again until every word has been written; returns them as float32.

    Each thread waits for its own words, without a barrier.

    Args:
        words: what `look` returned for the arguments that follow.
        status_ptr: to one int32, not 0 after a wait has failed.
        spin_limit: int32, the most polls.
    """
    if PORTABLE:
        polls = 0
        places = rows_in_slot(columns, H, below, HALF, HAS_BELOW) * (stride_bytes // 4)
        pending = tl.max(tl.ravel((words == SENTINEL).to(tl.int32)), axis=0)
        while pending != 0:
            polls += 1
            if polls >= spin_limit:
                tl.store(status_ptr, FAILED)
            if tl.load(status_ptr, volatile=True) != 0:
                pending = 0
            else:
                words = tl.load(base_ptr + places, volatile=True)
                pending = tl.max(tl.ravel((words == SENTINEL).to(tl.int32)), axis=0)
    else:
        words = tl.inline_asm_elementwise(
            _wait_assembly(PACK, HALF, HAS_BELOW),
            _constraints(PACK, "rlr"),
            [columns, base_ptr, stride_bytes, H, below, words, status_ptr, spin_limit],
            dtype=tl.int32,
            is_pure=False,
            pack=PACK,
        )
    return words.to(tl.float32, bitcast=True)


@triton.jit
def read_when_ready(
    base_ptr, columns, stride_bytes, status_ptr, spin_limit, PACK: tl.constexpr, PORTABLE: tl.constexpr
):
    """Read words of a slot as float32, each when it has been written; arguments as in `look` and `wait`."""
    words = look(base_ptr, columns, stride_bytes, PACK, PORTABLE)
    return wait(words, base_ptr, columns, stride_bytes, status_ptr, spin_limit, PACK, PORTABLE)


@triton.jit
def publish(ptr, h, mask):
    """Write h, float32, into the exchange: a strong store, with no NaN that could be the sentinel."""
    words = tl.where(h != h, NAN, h.to(tl.int32, bitcast=True))
    tl.store(ptr, words, mask=mask, cache_modifier=".wt")  # a plain store is weak; this is STG.E.STRONG


@triton.jit(do_not_specialize=["words", "slot_words", "zeros_from"])
def fill_exchange(exchange_ptr, words, slot_words, zeros_from, BLOCK: tl.constexpr):
    """Write SENTINEL everywhere and 0 into row H of every slot.

    Args:
        exchange_ptr: to `words` int32.
        slot_words: in a slot, (H + 1) * B.
        zeros_from: of a slot, H * B.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.where(offs % slot_words >= zeros_from, 0, SENTINEL)
    tl.store(exchange_ptr + offs, values, mask=offs < words)


def new_exchange(directions: int, steps: int, hidden_size: int, batch_size: int, device: torch.device) -> Tensor:
    """Return a filled exchange [D, steps + 1, H + 1, B] for one launch."""
    exchange = torch.empty(directions, steps + 1, hidden_size + 1, batch_size, dtype=torch.int32, device=device)
    words = exchange.numel()
    BLOCK = 4096
    grid = (triton.cdiv(words, BLOCK),)
    fill_exchange[grid](exchange, words, (hidden_size + 1) * batch_size, hidden_size * batch_size, BLOCK=BLOCK)
    return exchange
