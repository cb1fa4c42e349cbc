"""Vectors of floats and integer indices as Python expressions that emit LLVM instructions.

`a * b + c` on three `Vector`s emits a multiplication and an addition of `width` floats. They carry the flag "contract",
so LLVM may fuse the two into one instruction; nothing else may be rearranged. LLVM cuts vectors longer than those of
the processor into several, and a width of 16 is one register of AVX-512. (The stubs of llvmlite lack the flags of its
IRBuilder, which is Any here.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from llvmlite import ir
from numba.core import cgutils

TILE_ROWS = (8, 4, 2, 1)  # rows that share each load of a weight; 8 sums of a vector fit into the registers
_CONTRACT = ("contract",)
_FLOAT, _INT32, _INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)


class Index:
    """An int64 known when the code runs: a position, a count or an address."""

    def __init__(self, builder: Any, value: Any):
        self.builder, self.value = builder, value

    def __add__(self, other: Index | int) -> Index:
        return Index(self.builder, self.builder.add(self.value, _int64(other)))

    def __sub__(self, other: Index | int) -> Index:
        return Index(self.builder, self.builder.sub(self.value, _int64(other)))

    def __mul__(self, other: Index | int) -> Index:
        return Index(self.builder, self.builder.mul(self.value, _int64(other)))

    def __mod__(self, other: Index | int) -> Index:
        return Index(self.builder, self.builder.urem(self.value, _int64(other)))


class Vector:
    """`width` floats known when the code runs. A Python number beside an operator stands for itself in every lane."""

    def __init__(self, code: VectorCode, value: Any):
        self.code, self.value = code, value

    def __add__(self, other: Vector | float) -> Vector:
        return Vector(self.code, self.code.builder.fadd(self.value, self._value(other), flags=_CONTRACT))

    def __sub__(self, other: Vector | float) -> Vector:
        return Vector(self.code, self.code.builder.fsub(self.value, self._value(other), flags=_CONTRACT))

    def __mul__(self, other: Vector | float) -> Vector:
        return Vector(self.code, self.code.builder.fmul(self.value, self._value(other), flags=_CONTRACT))

    def __truediv__(self, other: Vector | float) -> Vector:
        return Vector(self.code, self.code.builder.fdiv(self.value, self._value(other)))

    def where(self, comparison: str, limit: float, then: Vector | float, otherwise: Vector) -> Vector:
        """`then` in each lane where self < limit (or ">", as the comparison says), else, and for NaN, `otherwise`."""
        holds = self.code.builder.fcmp_ordered(comparison, self.value, self._value(limit))
        return Vector(self.code, self.code.builder.select(holds, self._value(then), otherwise.value))

    def _value(self, other: Vector | float) -> Any:
        return other.value if isinstance(other, Vector) else self.code.constant(other).value


class Accumulator:
    """A vector that changes in a loop. It is written as a place in memory; LLVM keeps it in a register."""

    def __init__(self, start: Vector):
        self.code = start.code
        self.place = cgutils.alloca_once_value(start.code.builder, start.value)

    def add(self, vector: Vector) -> None:
        self.code.builder.store((vector + self.read()).value, self.place)

    def read(self) -> Vector:
        return Vector(self.code, self.code.builder.load(self.place))


class VectorCode:
    """Emits loads, stores and loops at one place of a numba function, on vectors of `width` floats."""

    def __init__(self, builder: Any, width: int):
        self.builder = builder
        self.width = width
        self.vector_type = ir.VectorType(_FLOAT, width)

    def constant(self, number: float) -> Vector:
        return Vector(self, ir.Constant(self.vector_type, [_FLOAT(number)] * self.width))

    def index(self, value: Any) -> Index:
        """Take over an int64 argument of the function, or a Python integer."""
        return Index(self.builder, _INT64(value) if isinstance(value, int) else value)

    def load(self, address: Index, index: Index) -> Vector:
        """Vector number `index` of those that begin at `address`."""
        return Vector(self, self.builder.load(self._at(address, index, self.vector_type), align=4))

    def store(self, vector: Vector, address: Index, index: Index) -> None:
        self.builder.store(vector.value, self._at(address, index, self.vector_type), align=4)

    def load_broadcast(self, address: Index, index: Index) -> Vector:
        """Float number `index` of those that begin at `address`, in every lane."""
        number = self.builder.load(self._at(address, index, _FLOAT))
        first = self.builder.insert_element(ir.Constant(self.vector_type, ir.Undefined), number, _INT32(0))
        lanes = ir.Constant(ir.VectorType(_INT32, self.width), [0] * self.width)
        return Vector(self, self.builder.shuffle_vector(first, first, lanes))

    def load_int32(self, address: Index, index: Index) -> Index:
        """Number `index` of the int32, none negative, that begin at `address`."""
        return Index(self.builder, self.builder.zext(self.builder.load(self._at(address, index, _INT32)), _INT64))

    @contextlib.contextmanager
    def loop(self, first: Index, end: Index, step: int = 1) -> Iterator[Index]:
        """Emit the body of the `with` once, run for first, first + step, ... below end."""
        with cgutils.for_range_slice(self.builder, first.value, end.value, _INT64(step)) as (index, _):
            yield Index(self.builder, index)

    def row_tiles(self, rows: Index) -> Iterator[tuple[Index, int]]:
        """Emit the body of the `for` once for each of TILE_ROWS, in loops that together take every row once.

        Yields the first row of a tile, known when the code runs, and the number of its rows.
        """
        done = self.index(0)
        for tile in TILE_ROWS:
            end = rows - rows % tile
            with self.loop(done, end, tile) as row:
                yield row, tile
            done = end

    def _at(self, address: Index, index: Index, element: ir.Type) -> Any:
        return self.builder.gep(self.builder.inttoptr(address.value, element.as_pointer()), [index.value])


def _int64(number: Index | int) -> Any:
    return number.value if isinstance(number, Index) else _INT64(number)
