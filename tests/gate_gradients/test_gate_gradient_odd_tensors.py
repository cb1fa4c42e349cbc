"""Layers with a gate_gradient meet tensors that are not plain numbers in memory, and numbers that are not Python's."""

import copy
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from gated_cases import B, H, I, T, cells
from torch._subclasses.fake_tensor import FakeTensorMode

from triton_sparse_rnn import GateGradientSparsity, SparseGRU, SparseLSTM


def make_layer(sparse_class: Any = SparseLSTM, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return sparse_class(I, H, gate_gradient=GateGradientSparsity(**(arguments or {"target": 0.5})))


@cells
def test_fake_tensors(dense_class, sparse_class):
    """Memory estimators run a model on them; nothing is learnt from that."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer = make_layer(sparse_class)
        layer(torch.randn(T, B, I))[0].sum().backward()
        assert layer.weight_hh_l0.grad.shape == layer.weight_hh_l0.shape
        assert layer.gate_gradient_controller.state_dict()["calibrated"] == [False]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", ["negated when read", "zeros without memory"])
def test_gradients_that_only_stand_for_numbers(kind, backend):
    layer = make_layer(threshold=0.0, backend=backend)
    dense = torch.nn.LSTM(I, H)
    dense.load_state_dict(layer.state_dict())
    x = torch.randn(T, B, I)
    for each in (layer, dense):
        y, _ = each(x)
        zeros = torch.ops.aten._efficientzerotensor(y.shape)
        y.backward(zeros if kind == "zeros without memory" else torch.ops.aten._neg_view(-torch.ones_like(y)))
    torch.testing.assert_close(layer.weight_hh_l0.grad, dense.weight_hh_l0.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_y_may_be_written_to_where_it_is_saved_no_more(dtype):
    """Torch says so in its usual words; nn.GRU and nn.LSTM in float64 do not need y and allow it."""
    layer = SparseGRU(I, H, dtype=dtype, gate_gradient=GateGradientSparsity(target=0.5))
    y, _ = layer(torch.randn(T, B, I, dtype=dtype))
    y.relu_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@cells
@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace_method` is deprecated")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_trace_in_training(dense_class, sparse_class):
    layer, x = make_layer(sparse_class), torch.randn(T, B, I)
    traced: Any = torch.jit.trace(layer, (x,))
    assert torch.equal(traced(x)[0], layer(x)[0])


def test_numbers_of_other_kinds():
    some: dict[str, Any] = {"target": Fraction(1, 2), "gain": np.float32(0.5), "seed": np.int64(3)}
    others: dict[str, Any] = {"threshold": Fraction(1, 50), "loss_scale": np.float16(0.5), "rule": "stochastic"}
    blocks: dict[str, Any] = {"structure": "blocks", "units": np.int64(3), "rows": np.uint8(2), "backend": "cpu"}
    for numbers in (some, others, some | blocks, others | blocks):
        layer = make_layer(**numbers)
        for _ in range(3):
            layer(torch.randn(T, B, I))[0].sum().backward()
        assert layer.gate_gradient_stats.mean_redundant_macs > 0
        assert isinstance(copy.deepcopy(layer.gate_gradient_controller).state_dict()["likely_zeros"][0], float)
    layer = make_layer(threshold=1e38, loss_scale=1e30)
    layer(torch.randn(T, B, I))[0].sum().backward()
    assert set(layer.gate_gradient_stats.zeros["l0"].values()) == {1.0}
    with pytest.raises(ValueError, match="threshold must be a number from 0 that float32 holds, got 1e\\+300"):
        GateGradientSparsity(threshold=1e300)
    with pytest.raises(ValueError, match="rows must be an integer from 1 to 2147483647"):
        GateGradientSparsity(target=0.5, structure="blocks", rows=10**30)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_blocks_larger_than_the_batch(backend):
    layer = make_layer(target=0.5, structure="blocks", rows=2**31 - 1, units=H, backend=backend)
    for _ in range(2):
        layer(torch.randn(T, B, I))[0].sum().backward()
    assert 0 < layer.gate_gradient_stats.mean_redundant_macs < 1


def test_a_layer_made_in_inference_mode():
    layer = make_layer()
    with torch.inference_mode():
        layer.gate_gradient = GateGradientSparsity(target=0.5)
    for _ in range(2):
        layer(torch.randn(T, B, I))[0].sum().backward()
    assert layer.gate_gradient_stats.steps == 2


def test_a_backward_that_cannot_begin_is_not_counted():
    layer = make_layer(threshold=0.1, loss_scale=lambda: 0.0)
    with pytest.raises(ValueError, match="loss_scale"):
        layer(torch.randn(T, B, I))[0].sum().backward()
    assert layer.gate_gradient_stats is None
