"""W x + b of every stored form against float64, with memory that is NaN before a kernel writes it (conftest.py)."""

import dataclasses

import pytest
import torch
from torch import Tensor

from triton_sparse_rnn.kernels.cpu import linear_layer
from triton_sparse_rnn.kernels.cpu.linear_layer import LinearLayer
from triton_sparse_rnn.ops.backends.reference import quantize_activations
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.picks import Picks

PATTERNS = [(16, 1), (7, 3), (16, 4), Picks(), Picks(16, 64, 4), Picks(5, 16)]
SIZES = [(33, 70), (48, 64), (1, 1), (16, 5)]
LEADING = [(), (1,), (3,), (2, 0), (2, 9)]


def sparse_matrix(rows: int, columns: int, density: float = 0.3) -> Tensor:
    return torch.randn(rows, columns) * (torch.rand(rows, columns) < density)


def assert_product(y: Tensor, matrix: BlockMatrix, bias: Tensor | None, x: Tensor) -> None:
    """Within what the roundings of float32 can come to, for each element."""
    weight, wide = matrix.to_dense().double(), x.double()
    exact = wide @ weight.t() + (0 if bias is None else bias.double())
    size = wide.abs() @ weight.abs().t() + (0 if bias is None else bias.abs().double())
    assert y.shape == exact.shape
    assert y.dtype == torch.float32
    assert y.is_contiguous()
    assert ((y - exact).abs() <= (x.shape[-1] + 4) * torch.finfo(torch.float32).eps * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_products_of_every_dtype(pattern, dtype):
    for rows, columns in SIZES[:2]:
        matrix, bias = BlockMatrix.from_dense(sparse_matrix(rows, columns), pattern, dtype=dtype), torch.randn(rows)
        for given in (bias, None):
            layer = LinearLayer(matrix, given, quantized=False)
            for shape in LEADING:
                x = torch.randn(*shape, columns)
                assert_product(layer(x), matrix, given, x)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_awkward_sizes(size, density):
    weight, bias = sparse_matrix(size[0], size[1], density), torch.randn(size[0])
    for pattern in ((16, 1), Picks()):
        matrix = BlockMatrix.from_dense(weight, pattern)
        layer = LinearLayer(matrix, bias, quantized=False)
        for N in range(1, 18):
            x = torch.randn(N, size[1])
            assert_product(layer(x), matrix, bias, x)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("rows", [16, 33])
def test_more_rows_than_a_window(monkeypatch, rows, num_threads):
    """The last window has fewer rows, and so has its last tile."""
    monkeypatch.setattr(linear_layer, "_WINDOW_BYTES", 1 << 12)
    monkeypatch.setattr(linear_layer, "_SHARED_BYTES", 0)
    matrix, bias = BlockMatrix.from_dense(sparse_matrix(rows, 70), (16, 1)), torch.randn(rows)
    layer = LinearLayer(matrix, bias, quantized=False, num_threads=num_threads)
    for N in (16, 37, 100):
        x = torch.randn(N, 70)
        assert_product(layer(x), matrix, bias, x)


@pytest.mark.parametrize("pattern", [(16, 4), (16, 1), Picks(), Picks(16, 64, 4)], ids=str)
def test_quantised_inputs_give_exact_sums(pattern):
    """All but the two scales and the bias is integers."""
    matrix, bias = BlockMatrix.from_dense(sparse_matrix(33, 70), pattern, dtype=torch.int8), torch.randn(33)
    assert matrix.scales is not None
    integers = dataclasses.replace(matrix, scales=None).to_dense().double()
    layer = LinearLayer(matrix, bias, quantized=True)
    for N in (1, 3, 9):
        x = torch.randn(N, 70)
        q, scales = quantize_activations(x)
        expected = (scales * matrix.scales).double() * (q.double() @ integers.t()) + bias.double()
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-6, atol=1e-6)


def test_the_same_call_gives_the_same_bits():
    layer = LinearLayer(BlockMatrix.from_dense(sparse_matrix(33, 70), Picks()), None, quantized=False)
    x = torch.randn(40, 70)
    assert torch.equal(layer(x), layer(x.clone()))


def test_what_is_written_into_weight_and_bias_counts():
    matrix, bias = BlockMatrix.from_dense(sparse_matrix(33, 70), (16, 1)), torch.randn(33)
    layer, x = LinearLayer(matrix, bias, quantized=False), torch.randn(2, 70)
    layer(x)
    matrix.values.mul_(2)
    bias.add_(1)
    assert_product(layer(x), matrix, bias, x)


def test_no_memory_is_no_crash(monkeypatch):
    layer = LinearLayer(BlockMatrix.from_dense(sparse_matrix(16, 5), (16, 1)), None, quantized=False)
    monkeypatch.setattr(layer, "_run", lambda *args: False)
    with pytest.raises(MemoryError, match="a call with 3 rows of x"):
        layer(torch.randn(3, 5))
    x = torch.randn(3, 5)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="x must have memory"):
        layer(x)
