import math

import pytest
import torch
from numba import njit, types

from triton_sparse_rnn.kernels.cpu.gates import gru_cell, sigmoid, tanh
from triton_sparse_rnn.kernels.cpu.intrinsics import intrinsic
from triton_sparse_rnn.kernels.cpu.vector_code import VectorCode

WIDTH = 16


def on_vectors(function, inputs):
    """Return a function that applies `function`, of that many vectors, to tensors whose length is a multiple of 16."""

    @intrinsic
    def apply(typing_context, sources, target, index):
        def generate(context, builder, signature, arguments):
            code = VectorCode(builder, WIDTH)
            *addresses, target, index = map(code.index, [*unpacked(builder, arguments[0]), *arguments[1:]])
            code.store(function(*(code.load(address, index) for address in addresses)), target, index)
            return context.get_dummy_value()

        return types.void(sources, types.int64, types.int64), generate

    def unpacked(builder, value):
        return [builder.extract_value(value, i) for i in range(inputs)]

    @njit
    def apply_all(sources, target, count):
        for index in range(count):
            apply(sources, target, index)

    def run(*tensors):
        result = torch.full_like(tensors[0], math.nan)
        assert len(result) % WIDTH == 0
        apply_all(tuple(tensor.data_ptr() for tensor in tensors), result.data_ptr(), len(result) // WIDTH)
        return result

    return run


POINTS = torch.cat(
    [torch.linspace(-20, 20, 16 * 4096), torch.logspace(-40, 38, 16 * 256), -torch.logspace(-40, 38, 4096)]
)


@pytest.mark.parametrize(("function", "expected"), [(tanh, torch.tanh), (sigmoid, torch.sigmoid)])
def test_nonlinear_functions_are_within_their_error(function, expected):
    result = on_vectors(function, 1)(POINTS)
    assert (result.double() - expected(POINTS.double())).abs().max() <= 2.5e-7
    assert result.abs().max() <= 1


@pytest.mark.parametrize(("function", "low"), [(tanh, -1.0), (sigmoid, 0.0)])
def test_nonlinear_functions_saturate_exactly_and_keep_nan(function, low):
    x = torch.tensor([math.inf, -math.inf, math.nan, 1e30, -1e30, 50.0, -50.0, 0.0]).repeat(2)
    result = on_vectors(function, 1)(x)[:8].tolist()
    assert math.isnan(result.pop(2))
    assert result == [1.0, low, 1.0, low, 1.0, low, function is sigmoid and 0.5]


def test_gru_cell_is_that_of_torch():
    torch.manual_seed(0)
    cell = torch.nn.GRUCell(1, 64, dtype=torch.float64)
    projected, recurrent, h = torch.randn(3, 64), torch.randn(3, 64), torch.randn(64)
    with torch.no_grad():
        cell.weight_ih[:] = projected.view(-1, 1)
        cell.bias_ih.zero_()
        cell.weight_hh.zero_()
        cell.bias_hh[:] = recurrent.flatten()
        expected = cell(torch.ones(1, 1, dtype=torch.float64), h[None].double())[0]
    result = on_vectors(lambda *rows: gru_cell(rows[:3], rows[3:6], rows[6]), 7)(*projected, *recurrent, h)
    assert (result - expected).abs().max() < 1e-6
