import pytest
import torch
from gpu_device import DEVICE
from gpu_layers import assert_close, random_matrix

from triton_sparse_rnn.kernels.triton.linear_layer import LinearLayer


@pytest.mark.parametrize(
    ("rows", "columns", "block_size", "weight_dtype", "x_dtype", "shape"),
    [
        (40, 70, (16, 1), torch.float32, torch.float32, ()),
        (17, 5, (16, 1), torch.float32, torch.float32, (1,)),
        (40, 70, (7, 3), torch.bfloat16, torch.bfloat16, (2, 3)),
        (33, 40, (16, 4), torch.float16, torch.float32, (17,)),
        (33, 40, (16, 4), torch.float32, torch.float32, (2, 0)),
        (1, 1, (1, 1), torch.float32, torch.float32, (2, 1)),
    ],
)
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.float64, torch.bfloat16])
def test_products(rows, columns, block_size, weight_dtype, x_dtype, shape, bias_dtype):
    torch.manual_seed(0)
    matrix = random_matrix(1, rows, columns, block_size, 0.5, weight_dtype)
    bias = None if bias_dtype is None else torch.randn(rows, device=DEVICE).to(bias_dtype)
    x = torch.randn(*shape, columns, device=DEVICE).to(x_dtype)
    y = LinearLayer(matrix, bias)(x)
    exact = x.double() @ matrix.to_dense().double().t() + (0 if bias is None else bias.double())
    assert y.dtype == x_dtype
    assert y.shape == exact.shape
    assert_close([y], [exact], 1e-5 if x_dtype == torch.float32 else 2e-2)
