"""The persistent modules with a dense input weight, quantised activations, threads, and options assigned to."""

import io
import warnings
from typing import Any

import pytest
import torch
from persistent_cases import (
    CELLS,
    assert_as_exact_as_nn,
    assert_same_bits,
    convert,
    every_cell_on_the_cpu,
    make_pruned,
    make_states,
    tensors_of,
)
from torch import nn

from triton_sparse_rnn.nn.persistent import PersistentLayer
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.layer_config import LayerConfig

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # of nn.LSTM

OPTIONS: dict[Any, dict[str, Any]] = {nn.RNN: {}, nn.GRU: {}, nn.LSTM: {"proj_size": 3}}


def make_half_pruned(cell, **options) -> Any:
    """A layer of which only the recurrent weights are pruned: its input weights stay dense."""
    layer = make_pruned(cell, **OPTIONS[cell], **options)
    for name, weight in layer.named_parameters():
        if name.startswith("weight_ih"):
            nn.init.normal_(weight)
    return layer


def convert_half_pruned(layer: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*little to skip")
        return convert(layer, storage=None, **options)


def convert_quantized(layer: Any, **options: Any) -> Any:
    return convert(layer, weight_dtype=torch.int8, activation_dtype=torch.int8, **options)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_a_dense_input_weight_in_a_call(cell, bidirectional):
    layer = make_half_pruned(cell, num_layers=2, bidirectional=bidirectional)
    ours = convert_half_pruned(layer)
    names = LayerConfig.of(layer).weight_names()
    dense = [name for name in names if name.startswith("weight_ih")]
    assert [name for name, weight in ours.stored_weights().items() if isinstance(weight, BlockMatrix)] == [
        name for name in names if name.startswith(("weight_hh", "weight_hr"))
    ]
    assert all(torch.equal(getattr(ours, name), getattr(layer, name)) for name in dense)
    x, hx = torch.randn(6, 3, 5), make_states(ours, 3)
    assert_as_exact_as_nn(ours(x, hx), layer, x, hx)
    assert_same_bits(list(ours.to_dense().state_dict().values()), list(layer.state_dict().values()))
    assert f"dense={dense}, weight_dtype=torch.float32" in repr(ours)
    assert ours.nbytes == sum(buffer.nbytes for buffer in ours.buffers())


def test_density_counts_a_dense_weight_whole():
    layer = make_half_pruned(nn.GRU)  # weight_ih [21, 5] and weight_hh [21, 7]
    ours = convert_half_pruned(layer)
    hh = ours.stored_weights()["weight_hh_l0"]
    assert ours.density == pytest.approx((21 * 5 + 21 * 7 * hh.density) / (21 * 12))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_dense_weight_follows_casts_like_a_bias(dtype):
    layer = make_half_pruned(nn.GRU)
    ours = convert_half_pruned(layer).to(dtype)
    assert ours.weight_ih_l0.dtype == ours.bias_ih_l0.dtype == dtype
    x = torch.randn(6, 3, 5, dtype=dtype)
    assert_as_exact_as_nn(ours(x), layer.to(dtype), x)
    meta = ours.to("meta")
    assert meta(torch.empty(6, 3, 5, dtype=dtype, device="meta"))[0].shape == (6, 3, 7)


def test_a_dense_weight_that_was_replaced_is_checked():
    ours = convert_half_pruned(make_half_pruned(nn.GRU, num_layers=2))
    x = torch.randn(3, 2, 5)
    ours(x)
    good = ours.weight_ih_l1
    for wrong, message in (
        (good[:, 1:].contiguous(), r"weight_ih must be torch.float32 of shape \(21, 7\) .* got .* \(21, 6\)"),
        (good.double(), "weight_ih must be torch.float32 .* got torch.float64"),
        (good.t().contiguous().t(), "weight_ih must be contiguous"),
    ):
        ours.weight_ih_l1 = wrong
        with pytest.raises(ValueError, match=message):
            ours(x)


def test_narrow_storage_keeps_no_weight_dense():
    with pytest.warns(UserWarning, match="weight_ih_l0 is .* and it runs as a dense product"):
        ours = convert(make_half_pruned(nn.GRU), weight_dtype=torch.bfloat16)
    assert "dense=" not in repr(ours)


@pytest.mark.parametrize("cell", CELLS)
def test_a_projection_and_dense_weights_through_compile_and_export(cell):
    torch.compiler.reset()
    ours = convert_half_pruned(make_half_pruned(cell, num_layers=2))
    x, hx = torch.randn(6, 3, 5), make_states(ours, 3)
    expected = ours(x, hx)
    compiled: Any = torch.compile(ours, fullgraph=True, backend="eager")
    assert_same_bits(compiled(x, hx), expected)
    exported = torch.export.export(ours, (x, hx), strict=False)
    assert_same_bits(exported.module()(x, hx), expected)


@pytest.mark.parametrize("cell", CELLS)
def test_quantized_activations_in_every_form_of_a_call(cell):
    """Near the same weights with activations as they are; the equations have their test in tests/ops."""
    torch.compiler.reset()
    layer = make_pruned(cell, num_layers=2, bidirectional=True, **OPTIONS[cell])
    ours, plain = convert_quantized(layer), convert(layer, weight_dtype=torch.int8)
    x, hx = torch.randn(6, 3, 5), make_states(layer, 3)
    result = ours(x, hx)
    for a, b in zip(tensors_of(result), tensors_of(plain(x, hx)), strict=True):
        assert not torch.equal(a, b)
        torch.testing.assert_close(a, b, rtol=0, atol=0.05)
    compiled: Any = torch.compile(ours, fullgraph=True, backend="eager")
    exported = torch.export.export(ours, (x, hx), strict=False)
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    for same in (compiled, exported.module(), torch.export.load(buffer).module()):
        assert_same_bits(same(x, hx), result)
    with pytest.raises(RuntimeError, match="has no backward"):
        ours(x.requires_grad_(), hx)[0].sum().backward()


@pytest.mark.parametrize("cell", CELLS)
def test_steps_with_quantized_activations(cell):
    ours = convert_quantized(make_pruned(cell, num_layers=2, **OPTIONS[cell]))
    x, hx = torch.randn(6, 3, 5), make_states(ours, 3)
    y = ours(x, hx)[0]
    for x_t, y_t in zip(x, y, strict=True):
        step, hx = ours.step(x_t, hx)
        assert_same_bits(step, y_t)  # integer sums do not depend on the number of rows


def test_quantized_activations_are_an_attribute():
    layer = make_pruned(nn.GRU)
    ours = convert_quantized(layer)
    x = torch.randn(6, 3, 5)
    quantized = ours(x)
    assert "activation_dtype=torch.int8, density=" in repr(ours)
    ours.activation_dtype = None
    assert_same_bits(ours(x), convert(layer, weight_dtype=torch.int8)(x))
    assert "activation_dtype" not in repr(ours)
    ours.activation_dtype = torch.int8
    assert_same_bits(ours(x), quantized)
    assert_same_bits(ours.double()(x.double())[0].float(), ours(x.double())[0].float())
    assert ours.activation_dtype == torch.int8


def test_batch_first_may_be_assigned():
    ours = convert(make_pruned(nn.GRU))
    x = torch.randn(6, 3, 5)
    y, h = ours(x)
    ours.batch_first = True
    assert_same_bits(ours(x.transpose(0, 1)), (y.transpose(0, 1), h))
    assert "batch_first=True" in repr(ours)
    assert ours.to_dense().batch_first


@pytest.mark.parametrize("called", [True, False])
def test_sizes_that_are_not_those_of_the_weights_are_refused(called):
    x = torch.randn(6, 3, 5)
    for name, value, message in (("hidden_size", 9, "do not fit together"), ("input_size", 6, "Expected 6, got 5")):
        ours = convert(make_pruned(nn.GRU))
        if called:
            ours(x)
        setattr(ours, name, value)
        with pytest.raises((ValueError, RuntimeError), match=message):
            ours(x)
    with pytest.raises(ValueError, match="num_layers must be at least 1"):
        ours.num_layers = 0


def test_threads_are_an_attribute():
    ours = convert(make_pruned(nn.GRU), num_threads=3)
    assert ours.num_threads == 3
    assert "num_threads=3, density=" in repr(ours)
    assert convert(make_pruned(nn.GRU)).num_threads == 1
    assert "num_threads" not in repr(convert(make_pruned(nn.GRU)))


@every_cell_on_the_cpu
def test_threads_change_no_result(cell, backend):
    x = torch.randn(6, 3, 5)
    one, two = (convert(make_pruned(cell, num_layers=2), backend, num_threads=n) for n in (1, 2))
    assert_same_bits(two(x), one(x))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"activation_dtype": torch.int8},
            ValueError,
            r"activation_dtype=torch.int8 needs weights in torch.int8, got torch.float32; give weight_dtype=torch.int8 "
            "too, or leave activation_dtype out",
        ),
        ({"activation_dtype": torch.int8, "weight_dtype": torch.bfloat16}, ValueError, "got torch.bfloat16"),
        ({"activation_dtype": torch.float16}, ValueError, "activation_dtype must be None or torch.int8"),
        ({"activation_dtype": "int8"}, ValueError, "activation_dtype must be None or torch.int8"),
        ({"num_threads": True}, TypeError, "num_threads must be an integer, got True"),
        ({"num_threads": 2.0}, TypeError, "num_threads must be an integer, got 2.0"),
        ({"num_threads": None}, TypeError, "num_threads must be an integer, got None"),
        ({"num_threads": 0}, ValueError, "num_threads must be at least 1, got 0"),
    ],
)
@pytest.mark.parametrize("cell", CELLS)
def test_wrong_options(cell, options, error, message):
    with pytest.raises(error, match=message):
        convert(make_pruned(cell), **options)


@pytest.mark.parametrize("name", ["weight_hh_l0", "weight_hr_l0"])
def test_only_input_weights_may_be_dense(name):
    layer: Any = make_pruned(nn.LSTM, proj_size=3)
    weights = convert(layer).stored_weights()
    cls, config = type(convert(layer)), LayerConfig.of(layer)
    with pytest.raises(TypeError, match=f"{name} must be a BlockMatrix, got Tensor"):
        cls(config, {**weights, name: weights[name].to_dense()}, dtype=torch.float32)
    assert isinstance(cls(config, weights, dtype=torch.float32), PersistentLayer)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.int8])
def test_the_projection_runs_from_its_blocks(weight_dtype):
    layer: Any = make_pruned(nn.LSTM, proj_size=3)
    ours = convert(layer, weight_dtype=weight_dtype)
    assert ours.weight_hr_l0_values.dtype == weight_dtype
    stored = ours.to_dense().requires_grad_(False)
    x = torch.randn(6, 3, 5)
    assert_as_exact_as_nn(ours(x), stored, x)
    before = ours(x)[0]
    ours.weight_hr_l0_values = torch.zeros_like(ours.weight_hr_l0_values)
    assert not torch.equal(ours(x)[0], before)


def test_a_pruned_projection_does_not_read_its_input():
    layer: Any = make_pruned(nn.LSTM, proj_size=3)
    layer.weight_hr_l0[:, 2] = 0
    x, (h, c) = torch.randn(1, 1, 5), make_states(layer, 1)
    c[0, 0, 2] = float("nan")
    assert not convert(layer)(x, (h, c))[0].isnan().any()
    c[0, 0, 1] = float("nan")
    assert convert(layer)(x, (h, c))[0].isnan().all()


def test_int8_weights_of_a_double_layer_run_as_float():
    layer = make_pruned(nn.GRU).double()
    x = torch.randn(4, 2, 5)
    results = [convert(layer, backend, weight_dtype=torch.int8).float()(x)[0] for backend in (None, "reference")]
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)
