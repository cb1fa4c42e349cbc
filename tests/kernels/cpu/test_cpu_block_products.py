"""The product kernel alone, on quantised inputs, whose sums are exact."""

import dataclasses

import numpy as np
import pytest
import torch
from cpu_layers import random_matrix
from emitted_code import call_kernel

from triton_sparse_rnn.kernels.cpu.matrix import format_of, matrix_fields
from triton_sparse_rnn.kernels.cpu.pack import PackFields, PackFormat
from triton_sparse_rnn.kernels.cpu.products import ProductFields
from triton_sparse_rnn.kernels.cpu.support import MOST_COLUMNS
from triton_sparse_rnn.ops.backends.reference import quantize_activations
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.patterns import as_pattern
from triton_sparse_rnn.sparse.picks import Picks

SIZES = [  # quads in and across blocks, wide blocks, no quads; bytes picked, of several registers too, and int32
    *((16, 4), (16, 1), (16, 6), (32, 20), (48, 8), (5, 3)),
    *(Picks(16, 64, 4), Picks(16, 8, 4), Picks(32, 32, 4), Picks(48, 16, 4)),
    *(Picks(16, 64, 2), Picks(16, 32, 1), Picks(8, 16, 4), Picks(5, 64, 2)),
]


def multiply(matrix: BlockMatrix, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return W q * scales + bias of quantised rows of x, [n, rows]."""
    layout, (gates, groups, _) = format_of(matrix, quantized=True), matrix.block_grid
    padded, units, rows = matrix.padded_columns, groups * layout.BR, len(x)
    packed, scales = torch.empty((rows + 3) * padded, dtype=torch.int8), torch.empty(rows)
    call_kernel(
        PackFormat.for_product(layout),
        PackFields(x.shape[1], padded, x.data_ptr(), 4 * x.shape[1], packed.data_ptr(), scales.data_ptr()),
        0,
        rows,
    )
    assert matrix.scales is not None
    assert matrix.shape[0] == gates * units  # constants need no filling up
    bias = torch.zeros(matrix.shape[0]) if bias is None else bias
    output = torch.empty(rows, gates, units)
    record = np.array(matrix_fields(matrix, bias, layout), dtype=np.int64)
    tensors = {"scales": matrix.scales, "bias": bias, "inputs": packed, "input_scales": scales, "output": output}
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    fields = ProductFields(record.ctypes.data, **addresses, rows=rows, output_bytes=4 * matrix.shape[0])
    call_kernel(layout, fields, 0, groups * layout.parts)
    return output.flatten(1)


def integers(matrix: BlockMatrix) -> torch.Tensor:
    return dataclasses.replace(matrix, scales=None).to_dense().long()


@pytest.mark.parametrize("pattern", SIZES)
def test_sums_are_exact(pattern):
    """In chunks of every number of rows; the columns are no multiple of the block."""
    matrix = random_matrix(2, 480, 101, pattern, 0.3, torch.int8)
    matrix = dataclasses.replace(matrix, scales=torch.ones(960))
    for n in range(1, 20):
        x = torch.randint(-127, 128, (n, 101)).float()
        x[:, 0] = 127  # so that the scale is 1
        assert torch.equal(multiply(matrix, x), (x.long() @ integers(matrix).t()).float())


@pytest.mark.parametrize("pattern", SIZES)
def test_scales_and_bias(pattern):
    matrix = random_matrix(2, 480, 101, pattern, 0.3, torch.int8)
    x, bias = torch.randn(13, 101), torch.randn(960)
    q, scales = quantize_activations(x)
    exact = (q.double() @ integers(matrix).double().t()) * scales.double() * matrix.scales.double() + bias  # pyright: ignore[reportOptionalMemberAccess]
    assert (multiply(matrix, x, bias) - exact).abs().max() <= 1e-6


@pytest.mark.parametrize("pattern", SIZES)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_do_not_overflow(pattern, sign):
    H = 2 * as_pattern(pattern).block_size[0]
    weight = torch.full((H, MOST_COLUMNS), 1.0)
    weight[::2] = -1.0
    matrix = BlockMatrix.from_dense(weight, pattern, dtype=torch.int8)
    matrix = dataclasses.replace(matrix, scales=torch.ones(H))
    assert matrix.values.max() == 127
    assert matrix.values.min() == -127
    result = multiply(matrix, torch.full((2, MOST_COLUMNS), 127.0 * sign))
    right = torch.full((2, H), 127.0 * 127 * MOST_COLUMNS * sign)
    right[:, ::2] *= -1
    assert torch.equal(result, right)
