"""Kernels compiled for what a layer needs, once in a process, and kept by numba's cache for the next process.

Numba files a function under the place of its source and a hash of the constants that it closes over. The constants of a
kernel are its description and a fingerprint of this folder's source, so a changed line anywhere in it compiles anew.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import cfunc, njit, types

from triton_sparse_rnn.kernels.cpu.intrinsics import intrinsic
from triton_sparse_rnn.kernels.cpu.layer import make_run_layer
from triton_sparse_rnn.kernels.cpu.pack import PackFormat, emit_pack
from triton_sparse_rnn.kernels.cpu.products import emit_product
from triton_sparse_rnn.kernels.cpu.step import StepFormat, emit_step
from triton_sparse_rnn.kernels.cpu.stored_weights import BlockFormat
from triton_sparse_rnn.kernels.cpu.team import make_help_out, make_share_work

_compiling = threading.Lock()
_layouts: dict[str, PackFormat | BlockFormat | StepFormat] = {}  # by what stands for them in compiled code


@functools.cache
def fingerprint() -> str:
    """Return a hash of every source file of this folder."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def kernel_address(layout: PackFormat | BlockFormat | StepFormat) -> int:
    """Return the address of the kernel that packs rows, multiplies by a matrix or takes a step.

    It is void(address of its fields, first, end). Threads that ask for the same one together wait for one compilation.
    """
    with _compiling:
        return _compiled(layout).address


@functools.cache
def compiled_layer() -> Callable[..., bool]:
    """Return `layer.run_layer`, compiled."""
    with _compiling:
        return _cached(njit, types.boolean(*[types.int64] * 13), nogil=True)(make_run_layer(fingerprint()))


@functools.cache
def compiled_share() -> int:
    """Return the address of `team.share_work`, compiled."""
    with _compiling:
        return _cached(cfunc, types.void(*[types.int64] * 4))(make_share_work(fingerprint())).address


@functools.cache
def compiled_helper() -> Callable[[int], int]:
    """Return `team.help_out`, compiled."""
    with _compiling:
        return _cached(njit, types.int64(types.int64), nogil=True)(make_help_out(fingerprint()))


@functools.cache
def _compiled(layout: PackFormat | BlockFormat | StepFormat) -> Any:
    description, source = repr(layout), fingerprint()
    _layouts[description] = layout

    def kernel(fields, first, end):
        _emitted(description, source, fields, first, end)

    return _cached(cfunc, types.void(*[types.int64] * 3))(kernel)


def _cached(compile: Callable[..., Any], signature: Any, **options: Any) -> Callable[..., Any]:
    """Return numba's decorator, with its cache where there is a folder for it."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return compile(signature, cache=True, **options)(function)
        except RuntimeError as error:
            if "cannot cache function" not in str(error):
                raise
            return compile(signature, **options)(function)

    return decorate


@intrinsic
def _emitted(typing_context, description, source, fields, first, end) -> Any:
    if not isinstance(description, types.StringLiteral):
        return None  # numba asks again with the constants

    def generate(context, builder, signature, values):
        layout = _layouts[description.literal_value]
        emit: Any = {PackFormat: emit_pack, BlockFormat: emit_product, StepFormat: emit_step}[type(layout)]
        emit(builder, layout, *values[2:])
        return context.get_dummy_value()

    return types.void(description, source, types.int64, types.int64, types.int64), generate
