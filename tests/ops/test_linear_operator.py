from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from triton_sparse_rnn.kernels.triton.exchange import INTERPRETED
from triton_sparse_rnn.ops.linear_operator import linear
from triton_sparse_rnn.ops.stored_linear import pack_matrix
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.picks import Picks

BACKENDS = ["reference", "cpu", None, *(["triton"] if INTERPRETED else [])]
R, C = 5, 7


def make_arguments(
    backend=None, *, dtype=torch.float32, bias=True, storage=(2, 1), weight_dtype=None, **options
) -> Any:
    """The arguments of the operator, for a weight that is zero but for two columns."""
    torch.manual_seed(0)
    weight = torch.randn(R, C, dtype=dtype) * (torch.arange(C) < 2)
    matrix = BlockMatrix.from_dense(weight, storage, dtype=weight_dtype)
    given: dict[str, Any] = {"activation_dtype": None, "num_threads": 1} | options
    own_bias = torch.randn(R, dtype=dtype) if bias else None
    return torch.randn(3, C, dtype=dtype), pack_matrix(matrix), own_bias, R, backend, *given.values()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(backend, bias):
    torch.library.opcheck(linear, make_arguments(backend, bias=bias))


@pytest.mark.parametrize(
    "options",
    [
        {"weight_dtype": torch.int8},
        {"weight_dtype": torch.int8, "activation_dtype": torch.int8},
        {"storage": Picks(2, 8), "num_threads": 2},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck_of_options(backend, options):
    torch.library.opcheck(linear, make_arguments(backend, **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_raises(backend):
    x, *rest = make_arguments(backend)
    arguments = (x.requires_grad_(), *rest)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(linear, arguments, test_utils=tests)
    with pytest.raises(RuntimeError, match=r"has no backward: it is for inference\. Train the .* nn.Linear that"):
        linear(*arguments).sum().backward()


def test_schema():
    assert str(torch.ops.triton_sparse_rnn.linear.default._schema) == (
        "triton_sparse_rnn::linear(Tensor x, Tensor?[] weight, Tensor? bias, SymInt out_features, str? backend, "
        "ScalarType? activation_dtype, SymInt num_threads) -> Tensor"
    )


def test_operations_are_counted():
    from triton_sparse_rnn.ops.flop_counting import count_in_active_modes

    x, weight, *rest = make_arguments()
    with FlopCounterMode(display=False) as counter:
        count_in_active_modes()
        linear(x, weight, *rest)
    assert counter.get_total_flops() == 2 * len(x) * weight[0].numel()


def without(index: int, value: Any) -> Any:
    return lambda arguments: [value if i == index else argument for i, argument in enumerate(arguments)]


def short_columns(arguments: Any) -> Any:
    x, (values, scales, columns, *rest), *others = arguments
    return x, [values, scales, columns[:-1], *rest], *others


def wrong_indices(arguments: Any) -> Any:
    arguments[1][2].fill_(1000)
    return arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(0, torch.zeros(C)), r"x must be \[N, columns\], got \(7,\)"),
        (without(1, []), "weight must be the tensors values, scales, columns, starts, picks, bank, got 0 tensors"),
        (without(2, torch.zeros(R + 1)), r"bias must be torch.float32 of shape \(5,\)"),
        (without(2, torch.zeros(R).double()), "bias must be torch.float32"),
        (without(3, R + 2), "starts must be torch.int32 of shape"),
        (without(5, torch.int8), "activation_dtype=torch.int8 needs weights in torch.int8"),
        (without(6, 0), "num_threads must be at least 1"),
        (short_columns, "columns must be torch.int32 of shape"),
        (wrong_indices, "columns must lie in"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    """Kernels would read past the end of what they are given."""
    with pytest.raises(ValueError, match=message):
        linear(*change(make_arguments("cpu")))
