"""What the processor can do for which numba compiles: the vectors it has, and the instructions that need asking for.

LLVM cuts the vectors of these kernels to what there is, AVX-512, AVX2 or less, and so every processor runs them. The
environment variables NUMBA_CPU_NAME and NUMBA_CPU_FEATURES choose another target than this machine.
"""

from __future__ import annotations

import functools
from typing import Any

from numba.core.registry import cpu_target


def compiled_for() -> tuple[str, str, str]:
    """Return LLVM's names of the kind of machine and of the processor, and the list of its features."""
    codegen: Any = cpu_target.target_context.codegen  # pyright: ignore[reportAttributeAccessIssue] a cached property
    return codegen().magic_tuple()


@functools.cache
def features() -> frozenset[str]:
    """Return LLVM's names of the features that are on, such as "avx512f"."""
    listed = compiled_for()[2]
    return frozenset(name[1:] for name in listed.split(",") if name.startswith("+"))


def vector_path() -> str:
    """Return "AVX-512", "AVX2" or "generic"."""
    return "AVX-512" if "avx512f" in features() else "AVX2" if {"avx2", "fma"} <= features() else "generic"


def registers_for(floats: int) -> int:
    """Return how many vectors of that many floats the registers hold."""
    registers, lanes = {"AVX-512": (32, 16), "AVX2": (16, 8), "generic": (16, 4)}[vector_path()]
    return registers // -(-floats // lanes)


def permuted_lanes(floats: int) -> int:
    """Return how many lanes of a vector of that many floats an instruction permutes at once; 0 where none does."""
    path = vector_path()
    if path == "AVX-512" and floats % 16 == 0:
        return 16
    return 8 if path != "generic" and floats % 8 == 0 else 0


def converts_half() -> bool:
    """Whether one instruction makes float32 of float16; without it LLVM calls a function that may not exist."""
    return "f16c" in features()


def multiplies_bytes() -> bool:
    """Whether vpdpbusd adds four products of bytes to each of sixteen int32."""
    return vector_path() == "AVX-512" and "avx512vnni" in features()


def permutes_bytes() -> bool:
    """Whether vpermb picks each of 64 bytes out of 64."""
    return vector_path() == "AVX-512" and "avx512vbmi" in features()
