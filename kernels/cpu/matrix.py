"""A BlockMatrix as compiled code reads it: a record of int64, made once, whose address kernels are given."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_sparse_rnn.kernels.cpu.addresses import address_of, addresses_of_parts
from triton_sparse_rnn.kernels.cpu.stored_weights import BlockFormat
from triton_sparse_rnn.kernels.cpu.vector_code import FLOAT_BYTES
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix


class MatrixFields(NamedTuple):
    """The record. "Padded" is filled up to whole blocks, or to whole banks."""

    values: Any  # addresses of the parts (BlockMatrix.PARTS), 0 for one that there is not
    columns: Any
    starts: Any
    scales: Any
    picks: Any
    bank: Any
    bias: Any  # address
    gates: Any
    gate_bytes: Any  # of padded H, between gates of scales, bias and outputs
    input_bytes: Any  # of a row of inputs as pack.py leaves it
    inputs: Any  # columns
    padded_inputs: Any
    quantized: Any
    row_bytes: Any  # of the H units of a gate
    vectors: Any  # in the units of a gate
    pack: Any  # address of the kernel that packs inputs
    product: Any  # of the one that multiplies; of W_hh, of the step
    padded_bias: Any  # offset in scratch of the padded bias, -1 where kernels read the tensor itself
    padded_scales: Any
    words: Any  # addresses of PickWords (pick_words.py), 0 where picks are read in bytes
    word_starts: Any


NO_MATRIX = MatrixFields(*[0] * len(MatrixFields._fields))._replace(padded_bias=-1, padded_scales=-1)


def format_of(matrix: BlockMatrix, quantized: bool) -> BlockFormat:
    """Return what kernels that read the matrix are compiled for."""
    dtype, bank = str(matrix.values.dtype).removeprefix("torch."), 0 if matrix.bank is None else int(matrix.bank)
    return BlockFormat(*matrix.block_size, dtype, quantized, bank)


def padded_rows(matrix: BlockMatrix) -> int:
    """Return the rows of all gates, each filled up to whole blocks."""
    gates, groups, _ = matrix.block_grid
    return gates * groups * matrix.block_size[0]


def matrix_fields(
    matrix: BlockMatrix, bias: Tensor, layout: BlockFormat, *, pack: int = 0, product: int = 0, scratch: int = 0
) -> MatrixFields:
    """Look at the parts of a matrix, and return its record.

    Args:
        matrix: [G * H, columns].
        bias: float32, a number for each row, or for each padded one.
        layout: `format_of` the matrix.
        pack, product: addresses of kernels that run_layer (layer.py) calls.
        scratch: offset of the place for a padded bias and padded scales, of `padded_rows` float32 each.
    """
    gates, groups, _ = matrix.block_grid
    rows, padded, padded_inputs = matrix.shape[0] // gates, groups * layout.BR, matrix.padded_columns
    own_bias, own_scales = bias.shape[0] >= gates * padded, matrix.scales is None or rows == padded
    return MatrixFields(
        **addresses_of_parts(matrix),
        bias=address_of("bias", bias, torch.float32, matrix.shape[0]),
        gates=gates,
        gate_bytes=padded * FLOAT_BYTES,
        input_bytes=padded_inputs * (1 if layout.quantized else FLOAT_BYTES),
        inputs=matrix.shape[1],
        padded_inputs=padded_inputs,
        quantized=layout.quantized,
        row_bytes=rows * FLOAT_BYTES,
        vectors=groups * layout.parts,
        pack=pack,
        product=product,
        padded_bias=-1 if own_bias else scratch,
        padded_scales=-1 if own_scales else scratch + gates * padded * FLOAT_BYTES,
        words=0,
        word_starts=0,
    )
