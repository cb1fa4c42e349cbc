"""Device code that takes narrow weights, and the columns of picks, out of 32-bit words: in each step anew.

A plain conversion is moved in front of the time loop, where its result takes the registers that narrow words save.
Assembly that is not said to be pure stays where it is.
"""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# Device code is Triton's language, which only looks like Python to a type checker.

import triton
import triton.language as tl

# How columns lie in 32-bit words: one in each, or one in a half of it, with something else in the other.
WHOLE = tl.constexpr(0)
LOW = tl.constexpr(1)
HIGH = tl.constexpr(2)


@triton.jit
def columns_in(words, HALF: tl.constexpr, PORTABLE: tl.constexpr):
    """The columns in words, int32. PORTABLE: for the interpreter, which knows no assembly."""
    if HALF == WHOLE:
        columns = words
    elif PORTABLE:
        columns = words & 0xFFFF if HALF == LOW else (words >> 16) & 0xFFFF
    else:
        columns = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 65535;" if HALF == LOW else "shr.u32 $0, $1, 16;",
            "=r,r",
            [words],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    return columns


@triton.jit
def widen_word(words, dtype: tl.constexpr, PORTABLE: tl.constexpr):
    """The weights in words, float32. dtype: that of a weight; narrow ones are the lower halves."""
    if dtype == tl.float32:
        out = words.to(tl.float32)
    elif PORTABLE:
        if dtype == tl.bfloat16:
            out = (words << 16).to(tl.float32, bitcast=True)
        else:
            out = (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif dtype == tl.bfloat16:
        out = tl.inline_asm_elementwise(
            "shl.b32 $0, $1, 16;", "=r,r", [words], dtype=tl.int32, is_pure=False, pack=1
        ).to(tl.float32, bitcast=True)
    else:
        out = tl.inline_asm_elementwise(
            "{ .reg .f16 low, high; mov.b32 {low, high}, $1; cvt.f32.f16 $0, low; }",
            "=f,r",
            [words],
            dtype=tl.float32,
            is_pure=False,
            pack=1,
        )
    return out


@triton.jit
def widen(weights, PORTABLE: tl.constexpr):
    """As float32: weights of blocks, two of which share a register where they are narrow."""
    if PORTABLE or weights.dtype == tl.float32:
        out = weights.to(tl.float32)
    elif weights.dtype == tl.bfloat16:
        out = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=&r,=&r,r",
            [weights],
            dtype=tl.int32,
            is_pure=False,
            pack=2,
        ).to(tl.float32, bitcast=True)
    else:
        out = tl.inline_asm_elementwise(
            "{ .reg .f16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }",
            "=&f,=&f,r",
            [weights],
            dtype=tl.float32,
            is_pure=False,
            pack=2,
        )
    return out
