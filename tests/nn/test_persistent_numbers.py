"""What the persistent modules compute: every dtype and storage, NaN and infinity, the same bits every time."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from persistent_cases import (
    CELLS,
    assert_as_exact_as_nn,
    assert_backends_agree_on_nan_and_infinity,
    assert_same_bits,
    convert,
    every_cell_and_backend,
    every_cell_on_the_cpu,
    make_pruned,
    make_states,
    run_after_fork,
    tensors_of,
)
from rounding import assert_same_sums, terms_of
from torch import nn

from triton_sparse_rnn.sparse.block_matrix import STORAGE_DTYPES


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(cell, dtype):
    layer = make_pruned(cell, num_layers=2, bidirectional=True, dtype=dtype)
    x, hx = torch.randn(20, 3, 5).to(dtype), make_states(layer, 3, dtype)
    ours = convert(layer)
    assert_as_exact_as_nn(ours(x, hx), layer, x, hx)


@every_cell_on_the_cpu
@pytest.mark.parametrize("T", [1, 50])
def test_float32_over_many_steps(cell, backend, T):
    layer = make_pruned(cell, 9, 33)
    with torch.no_grad():
        layer.weight_hh_l0.mul_(3)
    x, hx = 2 * torch.randn(T, 3, 9), make_states(layer, 3)
    assert_as_exact_as_nn(convert(layer, backend)(x, hx), layer, x, hx)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("weight_dtype", STORAGE_DTYPES)
def test_narrow_storage_computes_with_the_stored_weights(cell, weight_dtype):
    ours = convert(make_pruned(cell, num_layers=2), weight_dtype=weight_dtype)
    stored: Any = ours.to_dense().requires_grad_(False)
    assert ours.weight_hh_l1_values.dtype == weight_dtype
    assert ours.dtype == stored.weight_hh_l0.dtype == ours.bias_hh_l0.dtype == torch.float32
    x, hx = torch.randn(6, 3, 5), make_states(stored, 3)
    assert_as_exact_as_nn(ours(x, hx), stored, x, hx)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_conversion_of_a_converted_module(cell, weight_dtype, dtype):
    ours = convert(make_pruned(cell), weight_dtype=weight_dtype)
    assert ours.to(dtype) is ours
    assert ours.dtype == dtype
    assert ours.weight_ih_l0_values.dtype == (torch.int8 if weight_dtype == torch.int8 else dtype)
    stored: Any = ours.to_dense().requires_grad_(False)
    x = torch.randn(6, 3, 5, dtype=dtype)
    assert_as_exact_as_nn(ours(x), stored, x)


@every_cell_and_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_pruned_block_does_not_read_its_input(cell, backend, value):
    """Two blocks of BR x 1. Only the second half of the units reads x[1], and none reads units of the other half."""
    BR = 16 if backend == "triton" else 4
    H = 2 * BR
    layer = cell(3, H).requires_grad_(False)
    gates = len(layer.weight_hh_l0) // H
    eye, column = torch.eye(H).repeat(gates, 1), torch.zeros(gates, H, 3)
    for block in (slice(0, BR), slice(BR, H)):
        eye.view(gates, H, H)[:, block, block] = 1 / BR
    column[:, :, 0], column[:, BR:, 1] = 1, 1
    layer.weight_hh_l0.copy_(eye)
    layer.weight_ih_l0.copy_(column.flatten(0, 1))
    ours = convert(layer, backend, storage=(BR, 1))
    x = torch.randn(5, 2, 3)
    clean = ours(x)[0]
    x[2, 1, 1] = value
    y = ours(x)[0]
    torch.testing.assert_close(y[:, 0], clean[:, 0])
    torch.testing.assert_close(y[:, 1, :BR], clean[:, 1, :BR])
    torch.testing.assert_close(y[:2], clean[:2])
    if value != value:
        assert y[2:, 1, BR:].isnan().all()
    x[:, :, 2] = value  # no stored block at all
    assert_same_bits(ours(x)[0].nan_to_num(), y.nan_to_num())


@every_cell_and_backend
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0"])
def test_nan_in_a_weight_reaches_the_output(cell, backend, name):
    layer = make_pruned(cell)
    with torch.no_grad():
        getattr(layer, name).view(-1)[0] = float("nan")
    y, _ = convert(layer, backend)(torch.randn(3, 2, 5))
    assert y[:, :, 0].isnan().all()


def test_backends_agree_on_nan_and_infinity():
    assert_backends_agree_on_nan_and_infinity(make_pruned(nn.GRU, 6, 9, num_layers=2, bidirectional=True))


def test_sums_beyond_float16_are_held_in_float32():
    layer: Any = nn.RNN(1, 1, dtype=torch.float16).requires_grad_(False)
    for name, value in {"weight_ih": 110, "weight_hh": -100, "bias_ih": 0, "bias_hh": -60_000}.items():
        getattr(layer, f"{name}_l0").fill_(value)
    with pytest.warns(UserWarning, match="little to skip"):
        ours = convert(layer)
    x, h = torch.full((1, 1, 1), 600.0).half(), torch.full((1, 1, 1), 60.0).half()
    assert ours(x, h)[0].item() == 0  # 66000 - 6000 - 60000


@every_cell_and_backend
def test_same_bits_in_every_copy_process_and_thread(cell, backend):
    ours = convert(make_pruned(cell, 6, 20, num_layers=2), backend)
    x = torch.randn(7, 3, 6)
    expected = ours(x)
    assert_same_bits(ours(x), expected)
    assert_same_bits(copy.deepcopy(ours)(x), expected)
    assert_same_bits(pickle.loads(pickle.dumps(ours))(x), expected)
    if backend == "triton":
        return  # Triton's interpreter runs in one thread only
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: [ours(x) for _ in range(5)][-1], range(8)):
            assert_same_bits(result, expected)
    if backend == "reference":
        return  # torch's own threads do not survive a fork: nn.RNN hangs there too
    assert_same_bits(run_after_fork(ours, x), expected)


@every_cell_on_the_cpu
def test_rows_of_a_batch_do_not_depend_on_each_other(cell, backend):
    layer = make_pruned(cell, 6, 20)
    ours = convert(layer, backend)
    x = torch.randn(7, 13, 6)
    y = ours(x)[0]
    for b in (0, 5, 12):
        assert_same_sums([ours(x[:, b : b + 1])[0]], [y[:, b : b + 1]], terms_of(layer))


@every_cell_and_backend
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes(cell, backend, mode):
    ours = convert(make_pruned(cell), backend)
    x = torch.randn(3, 2, 5)
    expected = ours(x)
    with mode():
        assert_same_bits(ours(x), expected)
        assert_same_bits(ours(nn.Parameter(x)), expected)


@every_cell_and_backend
def test_there_is_no_backward(cell, backend):
    ours = convert(make_pruned(cell, num_layers=2), backend)
    x, hx = torch.randn(3, 2, 5), make_states(ours, 2)
    expected = ours(x, hx)
    message = "converted by to_sparse.. and has no backward: .* Train the SparseRNN, SparseGRU, SparseLSTM or nn.Linear"
    for wants_grad in (x, *tensors_of(hx)):
        wants_grad.requires_grad_()
        result = ours(x, hx)
        assert_same_bits(result, expected)
        with pytest.raises(RuntimeError, match=message):
            result[0].sum().backward()
        wants_grad.requires_grad_(False)
    with pytest.raises(RuntimeError, match=message):
        ours.step(x[0].requires_grad_())[0].sum().backward()
    head = nn.Linear(7, 1)
    head(ours(x.detach(), hx)[0]).sum().backward()  # what comes after the layer can be trained
    assert head.weight.grad is not None


def test_int8_of_large_inputs():
    """The range that from_dense states: absolute inputs that add up to less than 2.6e36."""
    layer = make_pruned(nn.RNN, 40, 7, nonlinearity="relu")
    x = torch.randn(3, 2, 40).abs()
    x *= 2.5e36 / x.sum(-1, keepdim=True)
    ours, reference = (convert(layer, backend, weight_dtype=torch.int8)(x)[0] for backend in ("cpu", "reference"))
    assert reference.isfinite().all()
    assert (reference > 1e34).any()
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e30)
