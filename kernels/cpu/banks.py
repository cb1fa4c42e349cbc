"""Numbers picked out of a bank by bytes, for each lane of a vector its own: shuffles of registers, never a gather.

A bank is a few neighbouring inputs of a row. It is loaded once for all vectors of weights that pick from it, and picks
are loaded once for all rows that share them. What picking a vector takes:

| instructions       | lanes | bank of 8 | 16      | 32         | 64          |
|--------------------|-------|-----------|---------|------------|-------------|
| AVX-512            | 16    | vpermps   | vpermps | vpermi2ps  | 2, a blend  |
| AVX2 and AVX-512   | 8     | vpermps   | 2, 1    | 4, 3       | 8, 7 blends |
| AVX-512 VBMI bytes | 64    | vpermb    | vpermb  | vpermb     | vpermb      |
| any                | 1     | a load    | a load  | a load     | a load      |

(vpermps, vpermi2ps and vpermb look at the low bits of a pick only, as many as they have lanes to choose from.) Bits do
not care what they mean, so int8 inputs are widened to int32 and picked as if they were floats.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir

from triton_sparse_rnn.kernels.cpu import target
from triton_sparse_rnn.kernels.cpu.vector_code import (
    FLOAT,
    FLOAT_BYTES,
    INT8,
    INT32,
    Index,
    Integers,
    Vector,
    VectorCode,
)


def picker(code: VectorCode, bank: int, *, quantized: bool) -> RegisterPicker | MemoryPicker:
    """Return what picks vectors of float32, or of int8 inputs as int32, in the best way that there is for them."""
    lanes = target.permuted_lanes(code.width)
    return RegisterPicker(code, bank, quantized, lanes) if lanes else MemoryPicker(code, bank, quantized)


class RegisterPicker:
    """Shuffles registers of 16 or 8 lanes."""

    def __init__(self, code: VectorCode, bank: int, quantized: bool, lanes: int):
        self.code, self.bank, self.quantized, self.lanes = code, bank, quantized, lanes

    def load_bank(self, inputs: Index) -> list[Any]:
        """The bank that begins at an address, as LLVM's vectors of `lanes` float32."""
        code, count = self.code, min(self.bank, self.lanes)
        registers = []
        for first in range(0, self.bank, count):
            if self.quantized:
                widened = code.builder.sext(code.load_bytes(inputs, code.index(first), count), _vector(INT32, count))
                register = code.builder.bitcast(widened, _vector(FLOAT, count))
            else:
                register = VectorCode(code.builder, count).load(inputs + first * FLOAT_BYTES, code.index(0)).value
            registers.append(code.repeat(register, self.lanes))
        return registers

    def load_picks(self, picks: Index, vector: Index) -> list[Any]:
        """Those of a vector, as LLVM's vectors of `lanes` int32."""
        code, width = self.code, self.code.width
        return [
            code.builder.zext(code.load_bytes(picks, vector * width + first, self.lanes), _vector(INT32, self.lanes))
            for first in range(0, width, self.lanes)
        ]

    def pick(self, bank: Any, picks: Any) -> Any:
        """A `Vector`, or `Integers`, of what each lane picks."""
        registers = [self._pick_lanes(bank, part) for part in picks]
        picked = Vector(self.code, functools.reduce(self.code.concatenate, registers))
        return picked.as_integers() if self.quantized else picked

    def _pick_lanes(self, bank: list[Any], picks: Any) -> Any:
        if self.lanes == 8:
            chosen = [self._shuffle("llvm.x86.avx2.permps", register, picks) for register in bank]
        elif len(bank) == 1:
            chosen = [self._shuffle("llvm.x86.avx512.permvar.sf.512", bank[0], picks)]
        else:
            pairs = zip(bank[::2], bank[1::2], strict=True)
            chosen = [self._shuffle("llvm.x86.avx512.vpermi2var.ps.512", low, picks, high) for low, high in pairs]
        while len(chosen) > 1:  # by the first bit of the picks that was not looked at yet
            chosen = self._choose(chosen, picks, (self.bank // len(chosen)).bit_length() - 1)
        return chosen[0]

    def _choose(self, vectors: list[Any], picks: Any, bit: int) -> list[Any]:
        """The second of each two vectors in the lanes whose pick has the bit, else the first."""
        code, pairs = self.code, zip(vectors[::2], vectors[1::2], strict=True)
        if self.lanes == 8:
            sign = code.builder.shl(picks, ir.Constant(picks.type, [INT32(31 - bit)] * 8))
            signs = code.builder.bitcast(sign, vectors[0].type)
            return [self._shuffle("llvm.x86.avx.blendv.ps.256", low, high, signs) for low, high in pairs]
        bits = code.builder.and_(picks, ir.Constant(picks.type, [INT32(1 << bit)] * self.lanes))
        is_high = code.builder.icmp_unsigned("!=", bits, picks.type(None))
        return [code.builder.select(is_high, high, low) for low, high in pairs]

    def _shuffle(self, name: str, *operands: Any) -> Any:
        return self.code.call_llvm(name, operands[0].type, *operands)


class MemoryPicker:
    """Loads the lanes one by one."""

    def __init__(self, code: VectorCode, bank: int, quantized: bool):
        self.code, self.quantized = code, quantized

    def load_bank(self, inputs: Index) -> Index:
        return inputs

    def load_picks(self, picks: Index, vector: Index) -> list[Index]:
        code = self.code
        return [code.load_index(picks, vector * code.width + lane, INT8) for lane in range(code.width)]

    def pick(self, bank: Any, picks: Any) -> Any:
        numbers = [self._load(bank, pick) for pick in picks]
        lanes: Any = ir.Constant(_vector(numbers[0].type, len(numbers)), ir.Undefined)
        for lane, number in enumerate(numbers):
            lanes = self.code.builder.insert_element(lanes, number, INT32(lane))
        return Integers(self.code, lanes) if self.quantized else Vector(self.code, lanes)

    def _load(self, bank: Index, pick: Index) -> Any:
        if self.quantized:
            return self.code.builder.sext(self.code.load_number(bank, pick, INT8), INT32)
        return self.code.load_number(bank, pick, FLOAT)


class BytePicker:
    """Picks the 4 bytes of each lane of int32, for vpdpbusd."""

    def __init__(self, code: VectorCode, bank: int):
        self.code, self.bank = code, bank

    def load_bank(self, inputs: Index) -> Any:
        """The bank that begins at an address, as LLVM's vector of 64 int8."""
        return self.code.repeat(self.code.load_bytes(inputs, self.code.index(0), self.bank), 64)

    def pick(self, bank: Any, picks: Any) -> Integers:
        """Of LLVM's vector of 4 * width picks."""
        code, results = self.code, []
        for first in range(0, 4 * code.width, 64):
            part = code.part(picks, first, 64)
            results.append(code.call_llvm("llvm.x86.avx512.permvar.qi.512", bank.type, bank, part))
        lanes = functools.reduce(code.concatenate, results)
        return Integers(code, code.builder.bitcast(lanes, _vector(INT32, code.width)))


def _vector(element: ir.Type, count: int) -> ir.VectorType:
    return ir.VectorType(element, count)
