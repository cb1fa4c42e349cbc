"""What numba functions do with addresses: read, write, copy, call.

Addresses are plain integers, because these enter compiled code several times faster than arrays do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

_INT64 = ir.IntType(64)


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """As numba's, whose own type still asks for the typing context where the result is called."""
    return extending.intrinsic(prefer_literal=True)(function)


@intrinsic
def close_over(typing_context, constant) -> Any:
    """Do nothing with a constant of an enclosing function, but make the caller close over it."""
    return types.void(constant), lambda context, builder, signature, values: context.get_dummy_value()


@intrinsic
def call_kernel(typing_context, kernel, fields, first, end) -> Any:
    """Call the compiled function at an address, void of three int64s."""

    def generate(context, builder, signature, values):
        _call(builder, values[0], values[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def run_kernel(typing_context, team, kernel, fields, count) -> Any:
    """Call a kernel for 0, ..., count - 1: here, or by the function whose address is the first word of a team."""

    def generate(context, builder, signature, values):
        team, kernel, fields, count = values
        alone = builder.icmp_signed("==", team, _INT64(0))
        with builder.if_else(alone) as (then, otherwise):
            with then:
                _call(builder, kernel, [fields, _INT64(0), count])
            with otherwise:
                share = builder.load(builder.inttoptr(team, _INT64.as_pointer()))
                _call(builder, share, [team, kernel, fields, count])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def _call(builder: Any, address: Any, arguments: Sequence[Any]) -> None:
    function_type = ir.FunctionType(ir.VoidType(), [_INT64] * len(arguments))
    builder.call(builder.inttoptr(address, function_type.as_pointer()), arguments)


@intrinsic
def load_int64(typing_context, address, index) -> Any:
    """Number `index` of the int64 that begin at `address`."""

    def generate(context, builder, signature, values):
        return builder.load(builder.gep(builder.inttoptr(values[0], _INT64.as_pointer()), [values[1]]))

    return types.int64(types.int64, types.int64), generate


@intrinsic
def load_tuple(typing_context, address, count) -> Any:
    """The first `count`, a constant, of the int64 that begin at `address`."""
    if not isinstance(count, types.IntegerLiteral):
        return None  # numba asks again with the constant
    result = types.UniTuple(types.int64, count.literal_value)

    def generate(context, builder, signature, values):
        numbers = builder.inttoptr(values[0], _INT64.as_pointer())
        loaded = [builder.load(builder.gep(numbers, [_INT64(i)])) for i in range(len(result))]
        return context.make_tuple(builder, result, loaded)

    return result(types.int64, count), generate


@intrinsic
def store_tuple(typing_context, address, numbers) -> Any:
    """Store a tuple of int64 from `address` on."""

    def generate(context, builder, signature, values):
        place = builder.inttoptr(values[0], _INT64.as_pointer())
        for i, number in enumerate(cgutils.unpack_tuple(builder, values[1])):
            builder.store(number, builder.gep(place, [_INT64(i)]))
        return context.get_dummy_value()

    return types.void(types.int64, numbers), generate


@intrinsic
def allocate(typing_context, size_bytes) -> Any:
    """The address of memory that `release` gives back; 0 if there is none. An array would take long to compile."""

    def generate(context, builder, signature, values):
        function_type = ir.FunctionType(cgutils.voidptr_t, [_INT64])
        malloc = cgutils.get_or_insert_function(builder.module, function_type, "malloc")
        return builder.ptrtoint(builder.call(malloc, values), _INT64)

    return types.int64(types.int64), generate


@intrinsic
def release(typing_context, address) -> Any:
    """Give back what `allocate` returned."""

    def generate(context, builder, signature, values):
        function_type = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t])
        free = cgutils.get_or_insert_function(builder.module, function_type, "free")
        builder.call(free, [builder.inttoptr(values[0], cgutils.voidptr_t)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def copy_rows(typing_context, rows, row_bytes, source, source_bytes, target, target_bytes) -> Any:
    """Copy the first row_bytes of each row; source_bytes and target_bytes are the distances between rows."""

    def generate(context, builder, signature, values):
        rows, row_bytes, source, source_bytes, target, target_bytes = values
        with cgutils.for_range(builder, rows) as loop:
            to, from_ = (
                builder.inttoptr(builder.add(first, builder.mul(loop.index, distance)), cgutils.voidptr_t)
                for first, distance in ((target, target_bytes), (source, source_bytes))
            )
            cgutils.raw_memcpy(builder, to, from_, row_bytes, 1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


@intrinsic
def zero_rows(typing_context, rows, first_byte, end_byte, target, target_bytes) -> Any:
    """Set bytes first_byte, ..., end_byte - 1 of each row to 0; target_bytes is the distance between rows."""

    def generate(context, builder, signature, values):
        rows, first_byte, end_byte, target, target_bytes = values
        with builder.if_then(builder.icmp_signed("<", first_byte, end_byte)), cgutils.for_range(builder, rows) as loop:
            row = builder.add(target, builder.mul(loop.index, target_bytes))
            place = builder.inttoptr(builder.add(row, first_byte), cgutils.voidptr_t)
            cgutils.memset(builder, place, builder.sub(end_byte, first_byte), 0)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@intrinsic
def load_shared(typing_context, address) -> Any:
    """The int64 at an address that other threads write to; what they wrote before it is seen too."""

    def generate(context, builder, signature, values):
        return builder.load_atomic(builder.inttoptr(values[0], _INT64.as_pointer()), "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def store_shared(typing_context, address, number) -> Any:
    """Set the int64 at an address that other threads read."""

    def generate(context, builder, signature, values):
        builder.store_atomic(values[1], builder.inttoptr(values[0], _INT64.as_pointer()), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def add_shared(typing_context, address, number) -> Any:
    """Add to the int64 at an address that other threads add to; returns what was there before."""

    def generate(context, builder, signature, values):
        return builder.atomic_rmw("add", builder.inttoptr(values[0], _INT64.as_pointer()), values[1], "acq_rel")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def pause(typing_context) -> Any:
    """Tell the processor that this thread waits in a loop."""

    def generate(context, builder, signature, values):
        if builder.module.triple.startswith(("x86_64", "i686")):
            function = builder.module.declare_intrinsic("llvm.x86.sse2.pause", (), ir.FunctionType(ir.VoidType(), []))
            builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def yield_processor(typing_context) -> Any:
    """Let another thread have this processor, if one waits for it."""

    def generate(context, builder, signature, values):
        function_type = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, function_type, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), generate
