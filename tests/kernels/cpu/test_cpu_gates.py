import math

import pytest
import torch
from emitted_code import on_loaded_vectors

from triton_sparse_rnn.kernels.cpu import target
from triton_sparse_rnn.kernels.cpu.gates import gru_cell, lstm_cell, relu, sigmoid, tanh

ERROR = 2.5e-7 if "fma" in target.features() else 3.6e-7  # gates.py has why
BY_RECIPROCAL = 3.2e-7 if target.vector_path() == "AVX-512" else ERROR
POINTS = torch.cat(
    [torch.linspace(-20, 20, 16 * 4096), torch.logspace(-40, 38, 16 * 256), -torch.logspace(-40, 38, 4096)]
)


@pytest.mark.parametrize(("function", "expected"), [(tanh, torch.tanh), (sigmoid, torch.sigmoid)])
@pytest.mark.parametrize("by_reciprocal", [False, True])
def test_nonlinear_functions_are_within_their_error(function, expected, by_reciprocal):
    result = on_loaded_vectors(function, by_reciprocal=by_reciprocal)(POINTS)
    assert (result.double() - expected(POINTS.double())).abs().max() <= (BY_RECIPROCAL if by_reciprocal else ERROR)
    assert result.abs().max() <= 1


@pytest.mark.parametrize("width", [1, 3, 5, 32])
def test_any_width(width):
    points = torch.linspace(-9, 9, 15 * 32)
    result = on_loaded_vectors(tanh, width)(points)
    assert (result.double() - points.double().tanh()).abs().max() <= ERROR
    result = on_loaded_vectors(tanh, width, by_reciprocal=True)(points)
    assert (result.double() - points.double().tanh()).abs().max() <= (ERROR if width % 16 else BY_RECIPROCAL)


@pytest.mark.parametrize(("function", "low"), [(tanh, -1.0), (sigmoid, 0.0)])
@pytest.mark.parametrize("by_reciprocal", [False, True])
def test_nonlinear_functions_saturate_exactly_and_keep_nan(function, low, by_reciprocal):
    x = torch.tensor([math.inf, -math.inf, math.nan, 1e30, -1e30, 50.0, -50.0, 0.0]).repeat(2)
    result = on_loaded_vectors(function, by_reciprocal=by_reciprocal)(x)[:8].tolist()
    assert math.isnan(result.pop(2))
    assert result == [1.0, low, 1.0, low, 1.0, low, function is sigmoid and 0.5]


def test_relu_is_that_of_torch_and_keeps_nan():
    x = torch.cat([torch.tensor([math.inf, -math.inf, math.nan, -0.0]), torch.linspace(-3, 3, 12), POINTS])
    result = on_loaded_vectors(relu)(x)
    assert torch.equal(result.nan_to_num(7.0), x.relu().nan_to_num(7.0))
    assert math.isnan(result[2])


def test_gru_cell_is_that_of_torch():
    cell = torch.nn.GRUCell(1, 64, dtype=torch.float64)
    projected, recurrent, h = torch.randn(3, 64), torch.randn(3, 64), torch.randn(64)
    with torch.no_grad():
        cell.weight_ih[:] = projected.view(-1, 1)
        cell.bias_ih.zero_()
        cell.weight_hh.zero_()
        cell.bias_hh[:] = recurrent.flatten()
        expected = cell(torch.ones(1, 1, dtype=torch.float64), h[None].double())[0]
    result = on_loaded_vectors(lambda *rows: gru_cell(rows[:3], rows[3:6], rows[6]))(*projected, *recurrent, h)
    assert (result - expected).abs().max() < 1e-6


@pytest.mark.parametrize("part", [0, 1])
def test_lstm_cell_is_that_of_torch(part):
    """Its h and its c."""
    cell = torch.nn.LSTMCell(1, 64, dtype=torch.float64)
    projected, recurrent, c = torch.randn(4, 64), torch.randn(4, 64), torch.randn(64)
    with torch.no_grad():
        cell.weight_ih[:] = projected.view(-1, 1)
        cell.bias_ih.zero_()
        cell.weight_hh.zero_()
        cell.bias_hh[:] = recurrent.flatten()
        expected = cell(torch.ones(1, 1, dtype=torch.float64), (torch.zeros(1, 64).double(), c[None].double()))[part][0]
    result = on_loaded_vectors(lambda *rows: lstm_cell(rows[:4], rows[4:8], rows[8])[part])(*projected, *recurrent, c)
    assert (result - expected).abs().max() < 1e-6


def test_a_gate_closed_by_infinity_is_zero():
    """Else a small number times infinity would open it."""
    one, inf = torch.ones(16), torch.full((16,), math.inf)
    gates = [one, -inf, one, one]  # i, f, g, o
    c = on_loaded_vectors(lambda *rows: lstm_cell(rows[:4], rows[4:8], rows[8])[1])(*gates, *[0 * one] * 4, 1e30 * one)
    assert torch.equal(c, c.clamp(-1, 1))
