"""Vectors of floats and integer indices as Python expressions that emit LLVM instructions.

`a * b + c` on three `Vector`s emits a multiplication and an addition of `width` floats. They carry the flag "contract",
so LLVM may fuse the two into one instruction; nothing else may be rearranged. LLVM cuts vectors longer than those of
the processor into several, and a width of 16 is one register of AVX-512. (The stubs of llvmlite lack the flags of its
IRBuilder, which is Any here.)
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from llvmlite import ir
from numba.core import cgutils

from triton_sparse_rnn.kernels.cpu import target

FLOAT, INT8, INT16, INT32, INT64 = ir.FloatType(), *(ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOAT_BYTES = 4
_BYTES = {FLOAT: FLOAT_BYTES, INT8: 1, INT16: 2, INT32: 4, INT64: 8}
_CONTRACT = ("contract",)
FieldsT = TypeVar("FieldsT", bound=NamedTuple)


class Index:
    """An int64 known when the code runs: a position, a count or an address."""

    def __init__(self, builder: Any, value: Any):
        self.builder, self.value = builder, value

    def __add__(self, other: Index | int) -> Index:
        return Index(self.builder, self.builder.add(self.value, _int64(other)))

    def __sub__(self, other: Index | int) -> Index:
        return Index(self.builder, self.builder.sub(self.value, _int64(other)))

    def __mul__(self, other: Index | int) -> Index:
        return self if other == 1 else Index(self.builder, self.builder.mul(self.value, _int64(other)))

    def __floordiv__(self, other: Index | int) -> Index:
        return self if other == 1 else Index(self.builder, self.builder.udiv(self.value, _int64(other)))

    def __mod__(self, other: Index | int) -> Index:
        return Index(self.builder, self.builder.urem(self.value, _int64(other)))

    def where(self, comparison: str, limit: Index | int, then: Index, otherwise: Index) -> Index:
        """`then` if self, taken as signed, is to limit as the comparison says, else `otherwise`."""
        holds = self.builder.icmp_signed(comparison, self.value, _int64(limit))
        return Index(self.builder, self.builder.select(holds, then.value, otherwise.value))


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

    def as_integers(self) -> Integers:
        """The bits of each lane."""
        return Integers(self.code, self.code.builder.bitcast(self.value, ir.VectorType(INT32, self.code.width)))

    def rounded(self) -> Integers:
        """The nearest integers, of two the even one, of floats up to 2^22: the bits of a sum that had to be rounded."""
        shift = 1.5 * 2.0**23
        sums = Vector(self.code, self.code.builder.fadd(self.value, self._value(shift)))
        return sums.as_integers() - self.code.constant(shift).as_integers()

    def __abs__(self) -> Vector:
        return (self.as_integers() & 0x7FFFFFFF).as_floats()

    def quotient(self, divisor: Vector) -> Vector:
        """What self / divisor is.

        By a reciprocal, where there is an instruction for it and it was asked for, to two units in the last place and
        if 1 / divisor is a normal float: that waits less than a division, and takes more instructions.
        """
        code = self.code
        if not code.by_reciprocal:
            return self / divisor
        parts = [code.part(divisor.value, first, 16) for first in range(0, code.width, 16)]
        mask = ir.IntType(16)(-1)
        name = "llvm.x86.avx512.rcp14.ps.512"
        near = [code.call_llvm(name, part.type, part, part.type(None), mask) for part in parts]
        guess = Vector(code, functools.reduce(code.concatenate, near))
        return self * (guess + guess * (code.constant(1.0) - divisor * guess))  # a step of Newton's: 14 bits, then 28

    def sqrt(self) -> Vector:
        kind = self.value.type
        return Vector(self.code, self.code.call_llvm(f"llvm.sqrt.v{self.code.width}f32", kind, self.value))

    def count_zeros(self) -> Index:
        """How many lanes are 0."""
        builder = self.code.builder
        lanes = builder.fcmp_ordered("==", self.value, self._value(0.0))
        bits = builder.zext(builder.bitcast(lanes, ir.IntType(self.code.width)), INT64)
        return Index(builder, self.code.call_llvm("llvm.ctpop.i64", INT64, bits))

    def where(self, comparison: str, limit: Vector | float, then: Vector | float, otherwise: Vector) -> Vector:
        """`then` in each lane where self < limit (or ">", as the comparison says), else, and for NaN, `otherwise`."""
        holds = self.code.builder.fcmp_ordered(comparison, self.value, self._value(limit))
        return Vector(self.code, self.code.builder.select(holds, self._value(then), otherwise.value))

    def _value(self, other: Vector | float) -> Any:
        return other.value if isinstance(other, Vector) else self.code.constant(other).value


class Integers:
    """`width` int32 known when the code runs; they wrap around. A Python number stands for itself in every lane."""

    def __init__(self, code: VectorCode, value: Any):
        self.code, self.value = code, value

    def __add__(self, other: Integers) -> Integers:
        return Integers(self.code, self.code.builder.add(self.value, other.value))

    def __sub__(self, other: Integers | int) -> Integers:
        return Integers(self.code, self.code.builder.sub(self.value, self._value(other)))

    def __mul__(self, other: Integers) -> Integers:
        return Integers(self.code, self.code.builder.mul(self.value, other.value))

    def __lshift__(self, bits: int) -> Integers:
        return Integers(self.code, self.code.builder.shl(self.value, self._value(bits)))

    def __rshift__(self, bits: int) -> Integers:
        """The unsigned numbers shifted: zeros come in."""
        return Integers(self.code, self.code.builder.lshr(self.value, self._value(bits)))

    def __xor__(self, other: Integers) -> Integers:
        return Integers(self.code, self.code.builder.xor(self.value, other.value))

    def __and__(self, other: Integers | int) -> Integers:
        return Integers(self.code, self.code.builder.and_(self.value, self._value(other)))

    def __or__(self, other: Integers | int) -> Integers:
        return Integers(self.code, self.code.builder.or_(self.value, self._value(other)))

    def where(self, comparison: str, limit: Integers | int, then: Integers, otherwise: Integers) -> Integers:
        """`then` in each lane where the unsigned self is to limit as the comparison says, else `otherwise`."""
        holds = self.code.builder.icmp_unsigned(comparison, self.value, self._value(limit))
        return Integers(self.code, self.code.builder.select(holds, then.value, otherwise.value))

    def to_floats(self) -> Vector:
        return Vector(self.code, self.code.builder.sitofp(self.value, ir.VectorType(FLOAT, self.code.width)))

    def as_floats(self) -> Vector:
        """What the bits of each lane are as float32."""
        return Vector(self.code, self.code.builder.bitcast(self.value, ir.VectorType(FLOAT, self.code.width)))

    def _value(self, other: Integers | int) -> Any:
        return other.value if isinstance(other, Integers) else self.code.integers(other).value


LanesT = TypeVar("LanesT", Vector, Integers)


class Accumulator(Generic[LanesT]):
    """What changes in a loop. It is written as a place in memory; LLVM keeps it in a register."""

    def __init__(self, start: LanesT):
        self.code, self.kind = start.code, type(start)
        self.place = cgutils.alloca_once_value(start.code.builder, start.value)

    def add(self, lanes: LanesT) -> None:
        self.write(lanes + self.read())

    def read(self) -> LanesT:
        return self.kind(self.code, self.code.builder.load(self.place))

    def write(self, lanes: LanesT) -> None:
        self.code.builder.store(lanes.value, self.place)


class VectorCode:
    """Emits loads, stores and loops at one place of a numba function, on vectors of `width` floats."""

    def __init__(self, builder: Any, width: int, *, by_reciprocal: bool = False):
        """`by_reciprocal` is of `Vector.quotient`."""
        self.builder = builder
        self.width = width
        self.by_reciprocal = by_reciprocal and target.vector_path() == "AVX-512" and width % 16 == 0

    def constant(self, number: float) -> Vector:
        return Vector(self, self.splat_constant(number, FLOAT))

    def integers(self, number: int) -> Integers:
        """A number of 32 bits, signed or not."""
        return Integers(self, self.splat_constant((number + (1 << 31)) % (1 << 32) - (1 << 31), INT32))

    def lane_numbers(self) -> Integers:
        return Integers(self, ir.Constant(ir.VectorType(INT32, self.width), list(range(self.width))))

    def splat_constant(self, number: float, element: ir.Type) -> Any:
        return ir.Constant(ir.VectorType(element, self.width), [element(number)] * self.width)

    def index(self, value: Any) -> Index:
        """Take over an int64 argument of the function, or a Python integer."""
        return Index(self.builder, INT64(value) if isinstance(value, int) else value)

    def fields(self, kind: type[FieldsT], address: Index) -> FieldsT:
        """Load the int64 that begin at `address` under the names of a NamedTuple."""
        return kind._make(self.load_index(address, self.index(i), INT64) for i in range(len(kind._fields)))

    def load(self, address: Index, index: Index) -> Vector:
        """Vector number `index` of those that begin at `address`."""
        return Vector(self, self.load_elements(address, index, FLOAT))

    def load_elements(self, address: Index, index: Index, element: ir.Type, vectors: int = 1) -> Any:
        """LLVM's vector of `vectors` * width elements, which begin `index` * width elements behind `address`."""
        place = self._at(address, index * self.width, element, vectors * self.width)
        return self.builder.load(place, align=_BYTES[element])

    def store(self, vector: Vector, address: Index, index: Index) -> None:
        self.store_elements(vector.value, address, index * self.width)

    def store_elements(self, elements: Any, address: Index, index: Index) -> None:
        """Store LLVM's vector of elements so that they begin `index` elements behind `address`."""
        kind = elements.type
        self.builder.store(elements, self._at(address, index, kind.element, kind.count), align=_BYTES[kind.element])

    def prefetch(self, address: Index, *, written: bool = False) -> None:
        """Ask for the cache line at an address, which may lie beyond all that is there."""
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, INT32, INT32, INT32])
        function = self.builder.module.declare_intrinsic("llvm.prefetch", (cgutils.voidptr_t,), kind)
        place = self.builder.inttoptr(address.value, cgutils.voidptr_t)
        self.builder.call(function, [place, INT32(int(written)), INT32(3), INT32(1)])

    def load_number(self, address: Index, index: Index, element: ir.Type) -> Any:
        """LLVM's number `index` of those that begin at `address`."""
        return self.builder.load(self._at(address, index, element))

    def load_broadcast(self, address: Index, index: Index) -> Vector:
        """Float number `index` of those that begin at `address`, in every lane."""
        return Vector(self, self.broadcast(self.load_number(address, index, FLOAT)))

    def broadcast_low_bits(self, index: Index) -> Integers:
        """The low 32 bits of an index, in every lane."""
        return Integers(self, self.broadcast(self.builder.trunc(index.value, INT32)))

    def load_broadcast_byte(self, address: Index, index: Index) -> Integers:
        """The same of an int8, as int32."""
        return Integers(self, self.broadcast(self.builder.sext(self.load_number(address, index, INT8), INT32)))

    def load_broadcast_int32(self, address: Index, index: Index) -> Integers:
        return Integers(self, self.broadcast(self.load_number(address, index, INT32)))

    def load_bytes(self, address: Index, index: Index, count: int) -> Any:
        """LLVM's vector of int8 from `index` on."""
        return self.builder.load(self._at(address, index, INT8, count), align=1)

    def broadcast_int32s(self, elements: Any) -> list[Integers]:
        """Each four bytes of LLVM's vector of int8, in every lane."""
        count = elements.type.count // 4
        numbers = self.builder.bitcast(elements, ir.VectorType(INT32, count))
        return [Integers(self, self.shuffle(numbers, numbers, [i] * self.width)) for i in range(count)]

    def add_byte_products(self, sums: Integers, unsigned: Integers, signed: Any) -> Integers:
        """Add to each lane the four products of bytes: `unsigned` has four in a lane, `signed` is a vector of int8."""
        signed, results = self.builder.bitcast(signed, sums.value.type), []
        for first in range(0, self.width, 16):  # lanes of one instruction
            operands = [self.part(value, first, 16) for value in (sums.value, unsigned.value, signed)]
            results.append(self.call_llvm("llvm.x86.avx512.vpdpbusd.512", operands[0].type, *operands))
        return Integers(self, functools.reduce(self.concatenate, results))

    def total(self, vector: Vector) -> Vector:
        """The sum of the lanes, in the order that suits the processor, in every lane."""
        lanes = vector.value.type.count
        kind = ir.FunctionType(FLOAT, [FLOAT, vector.value.type])
        function = self.builder.module.declare_intrinsic(f"llvm.vector.reduce.fadd.v{lanes}f32", (), kind)
        return Vector(
            self, self.broadcast(self.builder.call(function, [FLOAT(0.0), vector.value], fastmath=["reassoc"]))
        )

    def largest(self, integers: Integers) -> Integers:
        """The largest lane, taken as unsigned, in every lane."""
        lanes = integers.value.type.count
        return Integers(
            self, self.broadcast(self.call_llvm(f"llvm.vector.reduce.umax.v{lanes}i32", INT32, integers.value))
        )

    def concatenate(self, first: Any, second: Any) -> Any:
        """LLVM's vector of all lanes of the first and then of the second, which is not longer."""
        lanes = first.type.count + second.type.count
        return self.shuffle(first, self.repeat(second, first.type.count), range(lanes))

    def repeat(self, value: Any, count: int) -> Any:
        """LLVM's vector of so many lanes, those of a shorter or equal one again and again."""
        lanes = value.type.count
        return self.shuffle(value, value, [i % lanes for i in range(count)]) if count > lanes else value

    def part(self, value: Any, first: int, count: int) -> Any:
        """So many lanes of LLVM's vector, from `first` on."""
        return self.shuffle(value, value, range(first, first + count)) if count < value.type.count else value

    def spread(self, lanes: LanesT) -> LanesT:
        """The first of the lanes, in every lane."""
        return type(lanes)(self, self.shuffle(lanes.value, lanes.value, [0] * self.width))

    def broadcast(self, number: Any) -> Any:
        """LLVM's vector with the number in every lane."""
        first = self.builder.insert_element(
            ir.Constant(ir.VectorType(number.type, self.width), ir.Undefined), number, INT32(0)
        )
        return self.shuffle(first, first, [0] * self.width)

    def shuffle(self, first: Any, second: Any, lanes: Sequence[int]) -> Any:
        """LLVM's vector of the lanes of first and second, counted on from one to the other."""
        return self.builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(INT32, len(lanes)), list(lanes)))

    def interleave(self, vectors: Sequence[Any]) -> Any:
        """The first lanes of all LLVM vectors, then their second lanes, and so on. Their number is a power of two."""
        if len(vectors) == 1:
            return vectors[0]
        even, odd = self.interleave(vectors[::2]), self.interleave(vectors[1::2])
        count = even.type.count
        return self.shuffle(even, odd, [lane for pair in zip(range(count), range(count, 2 * count)) for lane in pair])  # noqa: B905

    def load_index(self, address: Index, index: Index, element: ir.Type = INT32) -> Index:
        """Number `index` of the integers, none negative, that begin at `address`."""
        number = self.load_number(address, index, element)
        return Index(self.builder, number if element is INT64 else self.builder.zext(number, INT64))

    def add_to_int64(self, number: Index, address: Index) -> None:
        """Add to the int64 at an address."""
        place = self._at(address, self.index(0), INT64)
        self.builder.store(self.builder.add(self.builder.load(place), number.value), place)

    @contextlib.contextmanager
    def loop(self, first: Index, end: Index, step: int = 1, *, unroll: bool = True) -> Iterator[Index]:
        """Emit the body of the `with` once, run for first, first + step, ... below end.

        Args:
            unroll: whether LLVM may make one turn of several, with code of their own for those that are left.
        """
        with cgutils.for_range_slice(self.builder, first.value, end.value, INT64(step)) as (index, _):
            yield Index(self.builder, index)
            last = self.builder.block
        if not unroll:
            module = self.builder.module
            disable = module.add_metadata(["llvm.loop.unroll.disable"])
            loop = ir.MDValue(module, (disable,), name=str(len(module.metadata)))
            loop.operands = (loop, disable)  # a node for this loop alone names itself first
            last.terminator.set_metadata("llvm.loop", loop)

    @contextlib.contextmanager
    def if_below(self, first: Index, end: Index) -> Iterator[None]:
        """Emit the body of the `with`, run where first, taken as signed, is less than end."""
        with self.builder.if_then(self.builder.icmp_signed("<", first.value, end.value)):
            yield

    def vectors_of(self, floats: Index, one: VectorCode | None = None) -> Iterator[tuple[VectorCode, Index]]:
        """Emit the body of the `for` in loops that take so many floats once: whole vectors, then one by one.

        Yields what emits on as many as are taken at a time, self or `one`, and the number of the first of them.
        """
        whole = floats - floats % self.width
        for part, first, end in ((self, self.index(0), whole), (one or VectorCode(self.builder, 1), whole, floats)):
            with part.loop(first, end, part.width) as number:
                yield part, number

    def row_tiles(self, rows: Index, largest: int) -> Iterator[tuple[Index, int]]:
        """Emit the body of the `for` for tiles of largest, largest / 2, ... 1 rows, in loops that take every row once.

        Yields the first row of a tile, known when the code runs, and the number of its rows.
        """
        done, tile = self.index(0), largest
        while tile:
            end = rows - rows % tile
            with self.loop(done, end, tile) as row:
                yield row, tile
            done, tile = end, tile // 2

    def smaller(self, first: Index, second: Index) -> Index:
        """The smaller of two, taken as signed."""
        return first.where("<", second, first, second)

    def stack(self, vectors: int) -> Index:
        """The address of a place for some vectors, which lasts as long as the call."""
        place = cgutils.alloca_once(self.builder, ir.VectorType(FLOAT, self.width), size=vectors)
        return Index(self.builder, self.builder.ptrtoint(place, INT64))

    def call_llvm(self, name: str, result: ir.Type, *values: Any) -> Any:
        """Call one of LLVM's intrinsic functions."""
        function_type = ir.FunctionType(result, [value.type for value in values])
        return self.builder.call(self.builder.module.declare_intrinsic(name, (), function_type), values)

    def _at(self, address: Index, index: Index, element: ir.Type, count: int = 0) -> Any:
        """A pointer to an element or, if there is a count, to that many of them."""
        pointer = self.builder.gep(self.builder.inttoptr(address.value, element.as_pointer()), [index.value])
        return self.builder.bitcast(pointer, ir.VectorType(element, count).as_pointer()) if count else pointer


def _int64(number: Index | int) -> Any:
    return number.value if isinstance(number, Index) else INT64(number)
