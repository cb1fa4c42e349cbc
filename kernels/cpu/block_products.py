"""Rows of blocks times inputs: the inner loop of every kernel, emitted where it is needed.

A row of blocks is the blocks of one gate of one unit group (sparse/block_matrix.py). Column c of block k is the vector
values[k, c] of BR weights, so with the input v the product of the row of blocks is the vector

    start + sum over k, c of values[k, c] * v[columns[k] * BC + c]

and a pruned block is not read at all. Several inputs share each load of a weight.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

from triton_sparse_rnn.kernels.cpu.vector_code import Accumulator, Index, Vector, VectorCode

_CHAINS = 4  # sums in flight at least, because a multiply-add waits for the one before it in the same sum
_COLUMNS_UNROLLED = 16  # of a wide block; the rest of it is a loop, so that code does not grow with BC


class BlockAddresses(NamedTuple):
    """Where the tensors of a BlockMatrix begin."""

    starts: Index
    columns: Index
    values: Index


def block_row_products(
    code: VectorCode, matrix: BlockAddresses, BC: int, row: Index, inputs: Sequence[Index], start: Vector
) -> list[Vector]:
    """Return start + row of blocks number `row` times each of the inputs, which are addresses of float32."""
    chains = max(1, _CHAINS // len(inputs))
    starts = [start] + [code.constant(0.0)] * (chains - 1)
    sums = [[Accumulator(vector) for vector in starts] for _ in inputs]

    def add_columns(block: Index, first: Index, count: int, chain: int = 0) -> None:
        """Add columns first, ..., first + count - 1 of a block, each to the next chain."""
        first_vector = block * BC + first
        first_column = code.load_int32(matrix.columns, block) * BC + first
        for c in range(count):
            weights = code.load(matrix.values, first_vector + c)
            for address, accumulators in zip(inputs, sums, strict=True):
                number = code.load_broadcast(address, first_column + c)
                accumulators[(chain + c) % chains].add(weights * number)

    def add_blocks(block: Index, count: int) -> None:
        whole = BC - BC % _COLUMNS_UNROLLED if BC > _COLUMNS_UNROLLED else 0
        for k in range(count):
            if whole:
                with code.loop(code.index(0), code.index(whole), _COLUMNS_UNROLLED) as first:
                    add_columns(block + k, first, _COLUMNS_UNROLLED)
            add_columns(block + k, code.index(whole), BC - whole, chain=k * BC)

    first, end = code.load_int32(matrix.starts, row), code.load_int32(matrix.starts, row + 1)
    blocks_unrolled = -(-chains // BC)
    rest = end - (end - first) % blocks_unrolled
    with code.loop(first, rest, blocks_unrolled) as block:
        add_blocks(block, blocks_unrolled)
    if blocks_unrolled > 1:
        with code.loop(rest, end) as block:
            add_blocks(block, 1)
    return [functools.reduce(operator.add, (chain.read() for chain in accumulators)) for accumulators in sums]
