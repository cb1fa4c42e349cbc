import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from triton_sparse_rnn.ops import reference
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that an operator returns."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.nbytes = max(self.nbytes, result.untyped_storage().nbytes())
        return result


def make_matrix(block_size: tuple[int, int], density: float = 0.5) -> BlockMatrix:
    torch.manual_seed(0)
    weight = torch.randn(3 * 37, 40).masked_fill(torch.rand(3 * 37, 40) > density, 0)
    return BlockMatrix.from_dense(weight, block_size, gates=3)


@pytest.mark.parametrize("block_size", [(16, 1), (5, 3)])
@pytest.mark.parametrize("density", [0, 0.5])
@pytest.mark.parametrize("chunk_bytes", [1, 20_000])
def test_the_product_of_blocks_in_chunks(monkeypatch, block_size, density, chunk_bytes):
    matrix, bias = make_matrix(block_size, density), torch.randn(3 * 37)
    for rows in (0, 1, 23):
        x = torch.randn(rows, 40).double()
        expected = reference.block_linear(matrix, bias, torch.float64)(x)
        with monkeypatch.context() as patch:
            patch.setattr(reference, "CHUNK_BYTES", chunk_bytes)
            y = reference.block_linear(matrix, bias, torch.float64)(x)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)


def test_the_product_of_blocks_takes_bounded_memory(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_BYTES", 2**20)
    linear = reference.block_linear(make_matrix((1, 1)), None, torch.float32)
    x = torch.full((2_000, 40), float("nan"))
    with LargestTensor() as largest:
        y = linear(x)
    assert y.nbytes <= largest.nbytes <= 2**20
    assert y.isnan().all()
