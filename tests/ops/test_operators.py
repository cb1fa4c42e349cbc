from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from triton_sparse_rnn.kernels.triton.exchange import INTERPRETED
from triton_sparse_rnn.ops.backends import reference
from triton_sparse_rnn.ops.layer_weights import (
    GATES,
    LayerWeights,
    pack_layer_weights,
)
from triton_sparse_rnn.ops.operators import is_observed, recurrent_layer
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix

I, H = 3, 5
MODES_AND_BACKENDS = [*((mode, backend) for mode in GATES for backend in ("reference", "cpu")), ("LSTM", None)]
if INTERPRETED:  # else "triton" takes no tensors on the CPU; of one cell, as interpreting takes its time
    MODES_AND_BACKENDS.append(("GRU", "triton"))


def make_weights(
    mode="GRU", dtype=torch.float32, proj_size=0, bias=True, weight_dtype=None, dense_input=False
) -> LayerWeights:
    """The weights of a direction, zero but for the first column of each matrix in blocks."""

    def blocks(matrix: Tensor, gates: int) -> BlockMatrix:
        matrix = matrix * (torch.arange(matrix.shape[1]) < 1)
        return BlockMatrix.from_dense(matrix, (2, 1), gates=gates, dtype=weight_dtype)

    gates = GATES[mode]
    ih, hh, hr = (
        torch.randn(*shape, dtype=dtype) for shape in ((gates * H, I), (gates * H, proj_size or H), (proj_size, H))
    )
    bias_ih, bias_hh = (torch.randn(gates * H, dtype=dtype) if bias else None for _ in range(2))
    return LayerWeights(
        ih if dense_input else blocks(ih, gates),
        blocks(hh, gates),
        bias_ih,
        bias_hh,
        blocks(hr, 1) if proj_size else None,
    )


def make_arguments(
    mode="GRU",
    backend=None,
    directions=1,
    packed=False,
    dtype=torch.float32,
    activation_dtype=None,
    num_threads=1,
    **options,
):
    weights = [make_weights(mode, dtype, **options) for _ in range(directions)]
    tensors = pack_layer_weights(weights)
    batch_sizes = torch.tensor([3, 2, 2, 1]) if packed else None
    x = torch.randn(8 if packed else 12, I, dtype=dtype)
    states = [torch.randn(directions, 3, options.get("proj_size") or H, dtype=dtype)]
    if mode == "LSTM":
        states.append(torch.randn(directions, 3, H, dtype=dtype))
    return x, states, tensors, batch_sizes, mode, H, backend, activation_dtype, num_threads


@pytest.mark.parametrize(("mode", "backend"), MODES_AND_BACKENDS)
@pytest.mark.parametrize(("directions", "packed"), [(1, True), (2, False)])
def test_opcheck(mode, backend, directions, packed):
    torch.library.opcheck(recurrent_layer, make_arguments(mode, backend, directions, packed))


OPTIONS: list[dict[str, Any]] = [
    {"proj_size": 2},
    {"bias": False},
    {"dense_input": True},
    {"weight_dtype": torch.int8, "proj_size": 2},
    {"weight_dtype": torch.int8, "activation_dtype": torch.int8},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck_of_options(backend, options):
    torch.library.opcheck(recurrent_layer, make_arguments("LSTM", backend, 2, num_threads=2, **options))


@pytest.mark.parametrize(("mode", "backend"), MODES_AND_BACKENDS)
def test_opcheck_with_gradients(mode, backend):
    """Without test_aot_dispatch, which runs a backward: it raises, as the next test shows."""
    x, states, *rest = make_arguments(mode, backend)
    arguments = (x.requires_grad_(), [state.requires_grad_() for state in states], *rest)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(recurrent_layer, arguments, test_utils=tests)


@pytest.mark.parametrize("wants_grad", ["x", "state"])
@pytest.mark.parametrize("output", [0, 1, 2])
def test_backward_raises(wants_grad, output):
    x, states, *rest = make_arguments("LSTM")
    (x if wants_grad == "x" else states[1]).requires_grad_()
    result = recurrent_layer(x, states, *rest)
    with pytest.raises(RuntimeError, match=r"has no backward: it is for inference\. Train the SparseRNN"):
        result[output].sum().backward()


def test_schema():
    schema = str(torch.ops.triton_sparse_rnn.recurrent_layer.default._schema)
    assert schema == (
        "triton_sparse_rnn::recurrent_layer(Tensor x, Tensor[] states, Tensor?[] weights, Tensor? batch_sizes, "
        "str mode, SymInt hidden_size, str? backend, ScalarType? activation_dtype, SymInt num_threads) "
        "-> Tensor[]"
    )


class Wrapped(Tensor):
    """A subclass of Tensor."""


def test_what_must_go_through_the_operator():
    x, states = torch.zeros(4, I), [torch.zeros(1, 2, H)]
    assert not is_observed(x, states)
    assert is_observed(x.as_subclass(Wrapped), states)
    assert is_observed(x, [states[0].as_subclass(Wrapped)])
    assert is_observed(x.to("meta"), states)
    wanted = x.clone().requires_grad_()
    assert is_observed(wanted, states)
    assert is_observed(x, [states[0].clone().requires_grad_()])
    with torch.no_grad():
        assert not is_observed(wanted, states)
    with FlopCounterMode(display=False):
        assert is_observed(x, states)


@pytest.mark.parametrize("block_size", [(1, 1), (2, 3), (4, 2), (16, 16)])
@pytest.mark.parametrize("gates", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int8])
@pytest.mark.parametrize("density", [0, 0.5])
def test_both_products_of_the_reference_agree(block_size, gates, dtype, density):
    weight = torch.randn(gates * 5, 7).masked_fill(torch.rand(gates * 5, 7) > density, 0)
    matrix = BlockMatrix.from_dense(weight, block_size, gates=gates, dtype=dtype)
    x, bias = torch.randn(4, 7, dtype=torch.float64), torch.randn(gates * 5)
    for b in (None, bias):
        products = [make(matrix, b, torch.float64)(x) for make in (reference.dense_linear, reference.block_linear)]
        torch.testing.assert_close(*products, rtol=0, atol=1e-13)
        assert products[0].dtype == torch.float64
