"""Rows times a matrix, in compiled code: packed if they need it, then multiplied by the kernel of products.py.

Scratch has a place for packed inputs, their scales and the fields of a kernel. `fields`, a NamedTuple, has the offsets
of these: `packed`, `packed_scales` and `kernel`.
"""

from __future__ import annotations

from numba import njit

from triton_sparse_rnn.kernels.cpu.intrinsics import copy_rows, load_tuple, run_kernel, store_tuple
from triton_sparse_rnn.kernels.cpu.matrix import MatrixFields
from triton_sparse_rnn.kernels.cpu.pack import PackFields
from triton_sparse_rnn.kernels.cpu.products import ProductFields
from triton_sparse_rnn.kernels.cpu.step import StepFields

MATRIX_WORDS = len(MatrixFields._fields)
KERNEL_BYTES = 8 * max(len(fields._fields) for fields in (PackFields, ProductFields, StepFields))
_INNER = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # called from compiled code only: less to compile


@njit(**_INNER)
def multiply(team, scratch, fields, address, rows, source, source_bytes, output, output_bytes):
    """W v + b for each row v, with the matrix at an address."""
    matrix, kernel = MatrixFields(*load_tuple(address, MATRIX_WORDS)), scratch + fields.kernel
    inputs = pack_rows(scratch, fields, matrix, rows, source, source_bytes)
    store_tuple(kernel, ProductFields(
        address,
        padded(scratch, matrix.padded_scales, matrix.scales), padded(scratch, matrix.padded_bias, matrix.bias),
        inputs, scratch + fields.packed_scales, rows, output, output_bytes,
    ))  # fmt: skip
    run_kernel(team, matrix.product, kernel, matrix.vectors)


@njit(**_INNER)
def pack_rows(scratch, fields, matrix, rows, source, source_bytes):
    """Return the address of rows as a product with the matrix reads them."""
    if rows == 1 and not matrix.quantized and source_bytes >= matrix.input_bytes:
        return source  # one row lies as it should, and is long enough
    packed, kernel = scratch + fields.packed, scratch + fields.kernel
    store_tuple(kernel, PackFields(
        matrix.inputs, matrix.padded_inputs, source, source_bytes, packed, scratch + fields.packed_scales
    ))  # fmt: skip
    run_kernel(0, matrix.pack, kernel, rows)
    return packed


@njit(**_INNER)
def padded(scratch, offset, address):
    """Return where kernels read a bias or scales: in scratch, where they are padded, or the tensor itself."""
    return address if offset < 0 else scratch + offset


@njit(**_INNER)
def pad_constants(scratch, address):
    """Copy bias and scales of the matrix at an address to their places in scratch, where kernels read padded ones."""
    matrix = MatrixFields(*load_tuple(address, MATRIX_WORDS))
    gates, row_bytes, gate_bytes = matrix.gates, matrix.row_bytes, matrix.gate_bytes
    if matrix.padded_bias >= 0:
        copy_rows(gates, row_bytes, matrix.bias, row_bytes, scratch + matrix.padded_bias, gate_bytes)
    if matrix.padded_scales >= 0:
        copy_rows(gates, row_bytes, matrix.scales, row_bytes, scratch + matrix.padded_scales, gate_bytes)
