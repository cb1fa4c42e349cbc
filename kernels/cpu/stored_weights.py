"""How the weights of a BlockMatrix are read as vectors: their layout, and each dtype in which they are stored.

A row of blocks is the blocks of one gate of one unit group (sparse/block_matrix.py), in memory one column of BR weights
after another. A column is cut into `parts` vectors of `width` weights, so that blocks of any height run:

    BR = 16   width 16, one part           BR = 48   width 16, parts 0 1 2           BR = 7   width 7, one part

Blocks of fewer rows than a vector of the processor has lanes leave the others idle, and that is what they cost.
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir

from triton_sparse_rnn.kernels.cpu import target
from triton_sparse_rnn.kernels.cpu.pick_words import PICK_BITS
from triton_sparse_rnn.kernels.cpu.vector_code import (
    FLOAT,
    FLOAT_BYTES,
    INT8,
    INT16,
    INT32,
    Index,
    Integers,
    Vector,
    VectorCode,
)

QUAD = 4  # columns that vpdpbusd multiplies at once
WIDEST = 32  # floats; a wider vector only makes LLVM slow


class BlockFormat(NamedTuple):
    """What a kernel that reads the blocks of a matrix is compiled for."""

    BR: int
    BC: int
    dtype: str  # "float32", "float16", "bfloat16" or "int8"
    quantized: bool = False  # the inputs are int8 too
    bank: int = 0  # neighbouring inputs out of which each row picks its own; 0: all rows of a block have the same

    @property
    def width(self) -> int:
        """Weights in a vector: BR, or of a taller block the largest part that fills whole registers, if one does."""
        fitting = [width for width in range(1, min(self.BR, WIDEST) + 1) if self.BR % width == 0]
        return max(fitting, key=lambda width: (width % 16 == 0, width))

    @property
    def parts(self) -> int:
        """Vectors in one column of a block."""
        return self.BR // self.width

    @property
    def tile_rows(self) -> int:
        """Rows of inputs that share each load of a weight: their sums fill no more than half of the registers.

        With banks that lie in registers too, they fill no more than three quarters.
        """
        registers = target.registers_for(self.width)
        fitting = registers // 2
        if self.bank and target.permuted_lanes(self.width):
            bank_bytes = self.bank * (1 if self.multiplies_quads else FLOAT_BYTES)
            vector_bytes = self.width * FLOAT_BYTES
            fitting = 3 * registers * vector_bytes // (4 * (vector_bytes + bank_bytes))
        return max(1, min(8, 1 << (fitting.bit_length() - 1))) if fitting else 1

    @property
    def reads_words(self) -> bool:
        """Whether picks are read in words (pick_words.py), and not in bytes."""
        fits = 0 < self.bank <= 1 << PICK_BITS and self.BC == 1 and not self.quantized
        return fits and target.permuted_lanes(self.width) == 16

    @property
    def multiplies_quads(self) -> bool:
        """Whether vpdpbusd is used: for inputs that are bytes, in vectors of sixteen rows, and of picks for quads."""
        if self.bank and not (self.BC == QUAD and target.permutes_bytes()):
            return False
        return self.quantized and self.width % 16 == 0 and target.multiplies_bytes()

    @property
    def quad(self) -> int:
        """Neighbouring inputs that lie together: QUAD where vpdpbusd takes them from one block, else 1."""
        return QUAD if self.multiplies_quads and self.BC % QUAD == 0 and not self.bank else 1


def load_weights(code: VectorCode, dtype: str, values: Index, index: Index) -> Vector:
    """Vector number `index` of the weights, as float32; of int8 without its scale."""
    if dtype == "float32":
        return code.load(values, index)
    if dtype == "int8":
        return load_integers(code, values, index).to_floats()
    bits = code.load_elements(values, index, INT16)
    if dtype == "float16" and target.converts_half():
        halves = code.builder.bitcast(bits, ir.VectorType(ir.HalfType(), code.width))
        return Vector(code, code.builder.fpext(halves, ir.VectorType(FLOAT, code.width)))
    integers = Integers(code, code.builder.zext(bits, ir.VectorType(INT32, code.width)))
    return (integers << 16).as_floats() if dtype == "bfloat16" else _floats_of_halves(integers)


def load_integers(code: VectorCode, values: Index, index: Index) -> Integers:
    """Vector number `index` of int8 weights, as int32."""
    return Integers(code, code.builder.sext(code.load_elements(values, index, INT8), ir.VectorType(INT32, code.width)))


def _floats_of_halves(bits: Integers) -> Vector:
    """Move exponent and fraction of a float16 into place, and correct the bias of the exponent by a product."""
    magnitude = bits & 0x7FFF
    finite = ((magnitude << 13).as_floats() * 2.0**112).as_integers()
    special = (magnitude << 13) | 0x7F800000  # infinity and NaN
    value = magnitude.where(">=", 0x7C00, special, finite) | ((bits & 0x8000) << 16)
    return value.as_floats()
