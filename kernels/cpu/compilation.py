"""Kernels compiled for what a layer needs, once in a process, and kept by numba's cache for the next process.

Numba files a function under its name, and tells its versions apart by the constants that it closes over. Those of a
kernel are its description and a fingerprint of this folder's source, so a changed line anywhere in it compiles anew.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import cfunc, njit, types

from triton_sparse_rnn.kernels.cpu import target
from triton_sparse_rnn.kernels.cpu.gate_gradients.sparse_products import (
    PanelFormat,
    SparseProductFormat,
    emit_panels,
    emit_sparse_product,
)
from triton_sparse_rnn.kernels.cpu.gate_gradients.states import CellFormat, emit_cells
from triton_sparse_rnn.kernels.cpu.gate_gradients.step import GateGradientFormat, emit_gate_gradients, make_go_back
from triton_sparse_rnn.kernels.cpu.intrinsics import intrinsic
from triton_sparse_rnn.kernels.cpu.layer import make_run_layer
from triton_sparse_rnn.kernels.cpu.linear import make_run_linear
from triton_sparse_rnn.kernels.cpu.pack import PackFormat, emit_pack
from triton_sparse_rnn.kernels.cpu.products import emit_product
from triton_sparse_rnn.kernels.cpu.step import StepFormat, emit_step
from triton_sparse_rnn.kernels.cpu.stored_weights import BlockFormat
from triton_sparse_rnn.kernels.cpu.team import make_help_out, make_run_calls, make_share_work

Format = PackFormat | BlockFormat | StepFormat | CellFormat | GateGradientFormat | PanelFormat | SparseProductFormat
_EMITTERS: dict[type[Any], Callable[..., None]] = {
    PackFormat: emit_pack,
    BlockFormat: emit_product,
    StepFormat: emit_step,
    CellFormat: emit_cells,
    GateGradientFormat: emit_gate_gradients,
    PanelFormat: emit_panels,
    SparseProductFormat: emit_sparse_product,
}
_compiling = threading.Lock()
# A process that forks while another of its threads compiles would leave the child with locks that nobody gives back.
os.register_at_fork(before=_compiling.acquire, after_in_parent=_compiling.release, after_in_child=_compiling.release)
_layouts: dict[str, Format] = {}  # by what stands for them in compiled code


@functools.cache
def fingerprint() -> str:
    """Return a hash of every source file of this folder and those in it."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


fingerprint()  # now, while the files are those that are being imported


def kernel_address(layout: Format) -> int:
    """Return the address of the kernel that is compiled for this.

    It is void(address of its fields, first, end). Threads that ask for the same one together wait for one compilation.
    """
    with _compiling:
        return _compiled(layout).address


@functools.lru_cache(maxsize=None, typed=True)  # tuples with the same fields are equal, whatever they are called
def kernel_function(layout: Format) -> Callable[[int, int, int], None]:
    """Return the same kernel for Python to call."""
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(kernel_address(layout))


@functools.cache
def compiled_layer() -> Callable[..., bool]:
    """Return `layer.run_layer`, compiled, to be called with integers: their types are not looked at."""
    signature = types.boolean(*[types.int64] * 13)
    with _compiling:
        return _cached(njit, signature, nogil=True)(make_run_layer(fingerprint())).get_overload(signature)


@functools.cache
def compiled_linear() -> Callable[..., bool]:
    """Return `linear.run_linear`, compiled, as `compiled_layer` does."""
    signature = types.boolean(*[types.int64] * 5)
    with _compiling:
        return _cached(njit, signature, nogil=True)(make_run_linear(fingerprint())).get_overload(signature)


@functools.cache
def compiled_go_back() -> Callable[..., None]:
    """Return `gate_gradients.go_back`, compiled."""
    with _compiling:
        return _cached(njit, types.void(*[types.int64] * 8), nogil=True)(make_go_back(fingerprint()))


@functools.cache
def compiled_share() -> Any:
    """Return `team.share_work`, as a numba cfunc."""
    with _compiling:
        return _cached(cfunc, types.void(*[types.int64] * 4))(make_share_work(fingerprint()))


@functools.cache
def compiled_helper() -> Callable[[int], int]:
    """Return `team.help_out`, compiled."""
    with _compiling:
        return _cached(njit, types.int64(types.int64), nogil=True)(make_help_out(fingerprint()))


@functools.cache
def compiled_calls() -> Any:
    """Return `team.run_calls`, as a numba cfunc."""
    with _compiling:
        return _cached(cfunc, types.void(*[types.int64] * 3))(make_run_calls(fingerprint()))


@functools.lru_cache(maxsize=None, typed=True)
def _compiled(layout: Format) -> Any:
    description, source = repr(layout), fingerprint()
    _layouts[description] = layout

    def kernel(fields, first, end):
        _emitted(description, source, fields, first, end)

    return _cached(cfunc, types.void(*[types.int64] * 3))(kernel)


def _cached(compile: Callable[..., Any], signature: Any, **options: Any) -> Callable[..., Any]:
    """Return numba's decorator, with its cache as long as that works."""

    def decorate(function: Callable[..., Any]) -> Any:
        # Numba names a pair of files, an index and code, after the function. With one pair for all kernels, processes
        # that write at once could leave an index that names another kernel's code.
        closed_over = [cell.cell_contents for cell in function.__closure__ or ()]
        constants = repr((closed_over, target.compiled_for()))
        function.__qualname__ = f"{function.__name__}_{hashlib.sha256(constants.encode()).hexdigest()[:32]}"
        try:
            return compile(signature, cache=True, **options)(function)
        except Exception:  # damaged files raise whatever reading them does; what is wrong with the code, raises again
            return compile(signature, **options)(function)

    return decorate


@intrinsic
def _emitted(typing_context, description, source, fields, first, end) -> Any:
    if not isinstance(description, types.StringLiteral):
        return None  # numba asks again with the constants

    def generate(context, builder, signature, values):
        layout = _layouts[description.literal_value]
        _EMITTERS[type(layout)](builder, layout, *values[2:])
        return context.get_dummy_value()

    return types.void(description, source, types.int64, types.int64, types.int64), generate
