"""What numba functions do with addresses: read, copy, call.

Addresses are plain integers, because these enter compiled code several times faster than arrays do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import cfunc, extending, njit, types
from numba.core import cgutils

FLOAT_BYTES = 4
_INT64 = ir.IntType(64)


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """As numba's, whose own type still asks for the typing context where the result is called."""
    return extending.intrinsic(function)


def compile_kernel(emit: Callable[..., None]) -> Any:
    """Return a numba cfunc, void of ten int64s, whose body is what emit(builder, *ten values) emits.

    Ten, as every kernel of this folder takes them (layer.py): numba compiles no cfunc of *arguments.
    """

    @intrinsic
    def emitted(typing_context, arguments) -> Any:
        def generate(context, builder, signature, values):
            emit(builder, *cgutils.unpack_tuple(builder, values[0]))
            return context.get_dummy_value()

        return types.void(types.UniTuple(types.int64, 10)), generate

    @cfunc(types.void(*[types.int64] * 10))
    def kernel(a, b, c, d, e, f, g, h, i, j):
        emitted((a, b, c, d, e, f, g, h, i, j))

    return kernel


@intrinsic
def call(typing_context, function, arguments) -> Any:
    """Call the compiled function at an address, void of int64s, with a tuple of integers."""

    def generate(context, builder, signature, values):
        numbers = cgutils.unpack_tuple(builder, values[1])
        function_type = ir.FunctionType(ir.VoidType(), [_INT64] * len(numbers))
        builder.call(builder.inttoptr(values[0], function_type.as_pointer()), numbers)
        return context.get_dummy_value()

    return types.void(types.int64, types.UniTuple(types.int64, len(arguments))), generate


@intrinsic
def load_int64(typing_context, address, index) -> Any:
    """Number `index` of the int64 that begin at `address`."""

    def generate(context, builder, signature, values):
        return builder.load(builder.gep(builder.inttoptr(values[0], _INT64.as_pointer()), [values[1]]))

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _copy(typing_context, target, source, size_bytes) -> Any:
    def generate(context, builder, signature, values):
        target, source = (builder.inttoptr(address, cgutils.voidptr_t) for address in values[:2])
        cgutils.raw_memcpy(builder, target, source, values[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def _zero(typing_context, target, size_bytes) -> Any:
    def generate(context, builder, signature, values):
        cgutils.memset(builder, builder.inttoptr(values[0], cgutils.voidptr_t), values[1], 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@njit
def copy_rows(rows, row_bytes, source, source_bytes, target, target_bytes):
    """Copy the first row_bytes of each row; source_bytes and target_bytes are the distances between rows."""
    for row in range(rows):
        _copy(target + row * target_bytes, source + row * source_bytes, row_bytes)


@njit
def zero_rows(rows, first_byte, end_byte, target, target_bytes):
    """Set bytes first_byte, ..., end_byte - 1 of each row to 0; target_bytes is the distance between rows."""
    if first_byte < end_byte:
        for row in range(rows):
            _zero(target + row * target_bytes + first_byte, end_byte - first_byte)
