"""Whole layers with quantised activations against ops/backends/reference.

Given the same state, a step rounds the same activations; from a state that differs in its last bit it may round one of
them to a neighbour. So it is single steps that are compared closely.
"""

import math

import pytest
import torch
from cpu_layers import MODES, RAGGED, Layer

from triton_sparse_rnn.ops.backends.reference import recurrent_layer
from triton_sparse_rnn.sparse.picks import Picks

PATTERNS = [(16, 4), Picks(16, 64, 4), (5, 3), (16, 1), Picks(8, 32), (32, 20), Picks(32, 16, 4)]


def layers(number, I=21, H=53):
    """Three layers of a cell, of other blocks and picks."""
    for shift in (1, 2, 3):
        block_hh, block_ih = PATTERNS[number], PATTERNS[(number + shift) % len(PATTERNS)]
        yield Layer(MODES[number], I, H, block_ih, block_hh, dtype=torch.int8, bias=shift == 1)


def by_reference(layer, x, states, batch_sizes=None):
    sizes = None if batch_sizes is None else torch.tensor(batch_sizes)
    return recurrent_layer(x, states, layer.directions, sizes, layer.mode, activation_dtype=torch.int8)


@pytest.mark.parametrize("number", range(len(MODES)))
@pytest.mark.parametrize("B", [1, 2, 7, 19])
def test_one_step(number, B):
    for layer in layers(number):
        x, states = layer.random_inputs([B])
        for ours, expected in zip(
            layer.ready(quantized=True)(x, states, None), by_reference(layer, x, states), strict=True
        ):
            torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("number", range(len(MODES)))
def test_every_remainder(number):
    for size in range(1, 14):
        for I, H in ((size, 7), (7, size)):
            for layer in layers(number, I, H):
                x, states = layer.random_inputs([3])
                ours, expected = layer.ready(quantized=True)(x, states, None), by_reference(layer, x, states)
                torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("number", range(len(MODES)))
def test_ragged_batches(number):
    """As many steps, and within what a few activations cost that round to a neighbour."""
    for layer in layers(number):
        x, states = layer.random_inputs(RAGGED)
        ours = layer.ready(quantized=True)(x, states, torch.tensor(RAGGED))
        torch.testing.assert_close(ours, by_reference(layer, x, states, RAGGED), rtol=0, atol=2e-3)


@pytest.mark.parametrize("number", range(len(MODES)))
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_no_blocks_and_all_blocks(number, density):
    layer = Layer(MODES[number], 21, 53, PATTERNS[2], PATTERNS[number], density=density, dtype=torch.int8)
    x, states = layer.random_inputs([5])
    ours = layer.ready(quantized=True)(x, states, None)
    torch.testing.assert_close(ours, by_reference(layer, x, states), rtol=0, atol=2e-6)


@pytest.mark.parametrize("number", range(len(MODES)))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_fills_its_row(number, value):
    """Every product of the row with a block; a row of the batch never reaches another one."""
    layer = Layer(MODES[number], 21, 53, PATTERNS[2], PATTERNS[number], dtype=torch.int8)
    for where in range(2):
        x, states = layer.random_inputs([9])
        if where:
            states[0][0, 4, -1] = value
        else:
            x[4, -1] = value
        y, *ends = layer.ready(quantized=True)(x, states, None)
        torch.testing.assert_close([y, *ends], by_reference(layer, x, states), rtol=0, atol=2e-6, equal_nan=True)
        assert y.isnan().any(1).tolist() == [row == 4 for row in range(9)]


@pytest.mark.parametrize("largest", [0.0, 1e-40, 1e-36, 1e-33, 1e-25])
def test_tiny_inputs(largest):
    """Against weights so large that what is lost would be seen."""
    layer = Layer("GRU", 21, 53, PATTERNS[0], PATTERNS[3], D=1, dtype=torch.int8)
    weight_ih = layer.directions[0].weight_ih
    weight_ih.scales.mul_(1.0 / max(largest, 1e-30))  # pyright: ignore
    x, states = layer.random_inputs([5])
    x *= largest
    ours = layer.ready(quantized=True)(x, states, None)
    torch.testing.assert_close(ours, by_reference(layer, x, states), rtol=0, atol=2e-6)
