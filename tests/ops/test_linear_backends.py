"""Every backend of a linear layer against float64."""

import pytest
import torch
from rounding import rounding_of_sums
from torch import Tensor

from triton_sparse_rnn.errors import BackendUnavailableError
from triton_sparse_rnn.kernels.triton.exchange import INTERPRETED
from triton_sparse_rnn.ops.backends import triton
from triton_sparse_rnn.ops.dispatch import BACKENDS, choose_linear_backend, linear_reason
from triton_sparse_rnn.ops.stored_linear import StoredLinear
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.picks import Picks

CPU = torch.device("cpu")
NAMES = ["reference", "cpu", *(["triton"] if INTERPRETED else [])]
R, C = 35, 50


def make_layer(pattern=(16, 1), dtype=torch.float32, weight_dtype=None, activation_dtype=None, bias=True):
    torch.manual_seed(0)
    weight = torch.randn(R, C, dtype=dtype) * (torch.rand(R, C) < 0.3)
    matrix = BlockMatrix.from_dense(weight, pattern, dtype=weight_dtype)
    return StoredLinear(matrix, torch.randn(R, dtype=dtype) if bias else None, dtype, CPU, activation_dtype)


def exact(layer: StoredLinear, x: Tensor) -> Tensor:
    y = x.double() @ layer.weight.to_dense().double().t()
    return y if layer.bias is None else y + layer.bias.double()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_products(name, dtype, bias):
    layer = make_layer(dtype=dtype, bias=bias)
    run = BACKENDS[name].prepare_linear(layer, 1)
    for shape in ((), (1,), (2, 3), (17,), (2, 0)):
        x = torch.randn(*shape, C).to(dtype)
        y = run(x)
        assert y.dtype == dtype
        assert y.shape == (*shape, R)
        expected = exact(layer, x)
        size = 10 if dtype == torch.float32 else expected.abs().amax().item() if y.numel() else 0
        atol = rounding_of_sums(C) * size + (0 if dtype == torch.float32 else torch.finfo(dtype).eps * size)
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=atol)


def test_the_reference_is_exact_in_float64():
    layer = make_layer(dtype=torch.float64)
    x = torch.randn(3, C, dtype=torch.float64)
    torch.testing.assert_close(BACKENDS["reference"].prepare_linear(layer, 1)(x), exact(layer, x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"activation_dtype": torch.int8}], ids=str)
@pytest.mark.parametrize("pattern", [(16, 4), Picks()], ids=str)
def test_int8_on_the_cpu_is_that_of_the_reference(pattern, options):
    layer = make_layer(pattern, weight_dtype=torch.int8, **options)
    x = torch.randn(9, C)
    ours, theirs = (BACKENDS[name].prepare_linear(layer, 1)(x) for name in ("cpu", "reference"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=10 * rounding_of_sums(C))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 9])
def test_picks(name, rows):
    layer, x = make_layer(Picks()), torch.randn(rows, C)
    y = BACKENDS[name].prepare_linear(layer, 1)(x)
    torch.testing.assert_close(y.double(), exact(layer, x), rtol=0, atol=10 * rounding_of_sums(C))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_travel_along_stored_weights_only(name, value):
    weight = torch.zeros(R, C)
    weight[:16, 3] = 1
    layer = StoredLinear(BlockMatrix.from_dense(weight, (16, 1)), None, torch.float32, CPU)
    x = torch.zeros(2, C)
    x[0, 3], x[1, 4] = value, value
    y = BACKENDS[name].prepare_linear(layer, 1)(x)
    assert not y[0, :16].isfinite().any()
    assert y[0, 16:].eq(0).all()
    assert y[1].eq(0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writes_into_the_bias_count(name, dtype):
    layer = make_layer(dtype=dtype)
    run, x = BACKENDS[name].prepare_linear(layer, 1), torch.zeros(2, C, dtype=dtype)
    run(x)
    assert layer.bias is not None
    layer.bias.fill_(3)
    assert run(x).eq(3).all()


@pytest.mark.parametrize("name", NAMES)
def test_inputs_of_any_strides(name):
    layer = make_layer()
    run, x = BACKENDS[name].prepare_linear(layer, 1), torch.randn(C, 4)
    torch.testing.assert_close(run(x.t()), run(x.t().contiguous()), rtol=0, atol=10 * rounding_of_sums(C))
    flipped = vars(torch)["_neg_view"](x.t())
    torch.testing.assert_close(run(flipped), run((-x.t()).contiguous()), rtol=0, atol=10 * rounding_of_sums(C))


def test_the_fastest_backend_is_chosen():
    assert choose_linear_backend(None, make_layer()) == "cpu"
    assert choose_linear_backend(None, make_layer(dtype=torch.float64)) == "reference"
    with pytest.raises(BackendUnavailableError, match="backend 'cpu' cannot run this layer: it computes in float32"):
        choose_linear_backend("cpu", make_layer(dtype=torch.float64))
    with pytest.raises(ValueError, match="backend must be None or one of"):
        choose_linear_backend("gpu", make_layer())


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (make_layer(weight_dtype=torch.int8), "weight is stored as torch.int8"),
        (make_layer(weight_dtype=torch.int8, activation_dtype=torch.int8), "it does not quantise activations"),
        (make_layer(dtype=torch.float64), "it computes in float32"),
    ],
)
def test_what_triton_does_not_run(layer, reason):
    if not INTERPRETED:
        pytest.skip("tensors on the CPU, without the interpreter")
    found = linear_reason("triton", layer)
    assert found is not None
    assert reason in found


@pytest.mark.skipif(not INTERPRETED, reason="tensors on the CPU need the interpreter")
def test_triton_prepares_once_for_the_same_tensors():
    layer = make_layer()
    prepared = triton.prepare_linear(layer, 1)
    assert triton.prepare_linear(layer, 1) is prepared
    assert triton.prepare_linear(layer._replace(bias=None), 1) is not prepared
