"""What is not finite or hardly a number, in every tensor of a layer, and scratch that nobody wrote to."""

import math

import pytest
import torch
from cpu_layers import MODES, Layer

from triton_sparse_rnn.ops.backends.reference import recurrent_layer
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.picks import Picks

INF, NAN = math.inf, math.nan
PATTERNS = [((5, 3), (4, 3)), (Picks(16, 8, 2), Picks(8, 16)), (Picks(7, 8), Picks(16, 32))]
by_patterns = pytest.mark.parametrize("patterns", PATTERNS, ids=["blocks", "picks", "other picks"])


def by_reference(layer, x, states):
    """In float64. A block that is not stored does not read its input."""
    wide = [state.double() for state in states]
    return recurrent_layer(x.double(), wide, layer.directions, None, layer.mode)


def vectors_of(layer, x, states):
    """Vectors of the layer in which a value is put, by the names of their tensors."""
    direction = layer.directions[0]
    matrices = {"weight_ih": direction.weight_ih, "weight_hh": direction.weight_hh, "weight_hr": direction.weight_hr}
    weights = {name: matrix.values[:, 0, 0] for name, matrix in matrices.items() if matrix is not None}
    biases = {"bias_ih": direction.bias_ih, "bias_hh": direction.bias_hh}
    return weights | biases | {"x": x[1]} | {name: state[0, -1] for name, state in zip(("h0", "c0"), states)}  # noqa: B905


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@by_patterns
def test_what_is_not_finite_reaches_only_what_depends_on_it(mode, value, patterns):
    """At the last unit and column as well, where blocks are filled up."""
    confined = set()
    for seed, column, B in ((0, 0, 1), (1, -1, 2), (2, -1, 1)):
        for name in vectors_of(*_layer(mode, patterns, seed, B)):
            layer, x, states = _layer(mode, patterns, seed, B)
            vector = vectors_of(layer, x, states)[name]
            assert vector is not None
            vector[column] = value
            ours, expected = layer.ready()(x, states, None), by_reference(layer, x, states)
            for result, right in zip(ours, expected, strict=True):
                torch.testing.assert_close(result.double(), right, rtol=1e-6, atol=2e-6, equal_nan=True)
                if result.isfinite().any() and not result.isfinite().all():
                    confined.add(name)
    assert not math.isnan(value) or confined >= {"x", "h0"}


def _layer(mode, patterns, seed, B):
    torch.manual_seed(seed)
    layer = Layer(mode, 8, 17, *patterns, density=0.3)
    return layer, *layer.random_inputs([B] * 3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["x", "weight"])
@by_patterns
def test_denormals_are_numbers(mode, where, patterns):
    """Times numbers so large that the products are of the usual size."""
    layer = Layer(mode, 8, 18, *patterns)
    tiny, large = 5e-39, 2e37
    for direction in layer.directions:
        assert isinstance(direction.weight_ih, BlockMatrix)
        direction.weight_ih.values.mul_(large if where == "x" else tiny)
    x, states = layer.random_inputs([3] * 4)
    x *= tiny if where == "x" else large
    for result, right in zip(layer.ready()(x, states, None), layer.by_torch(x, states, [3] * 4), strict=True):
        torch.testing.assert_close(result.double(), right, rtol=0, atol=2e-6)


def test_denormal_states_are_kept():
    layer = Layer("RNN_RELU", 8, 18, (5, 3), (4, 3), bias=False)
    x, states = layer.random_inputs([3] * 4)
    x, states = x * 1e-39, [state * 1e-39 for state in states]
    for result, right in zip(layer.ready()(x, states, None), layer.by_torch(x, states, [3] * 4), strict=True):
        assert right.max() < 1.1e-38
        assert right.max() > 1e-40
        torch.testing.assert_close(result.double(), right, rtol=0, atol=1e-43)


@pytest.mark.parametrize("mode", ["RNN_TANH", "LSTM projected"])
@pytest.mark.parametrize("pattern", [(1, 2), (1, 7), Picks(1, 64), Picks(16, 64)], ids=str)
@pytest.mark.parametrize("B", [1, 2])
def test_scratch_is_zero_where_it_meets_a_weight(mode, pattern, B):
    """The last block column or bank reaches beyond the units, and memory is NaN before it is written (conftest.py)."""
    layer = Layer(mode, 13, 17, pattern, pattern, density=1.0)
    x, states = layer.random_inputs([B] * 5)
    for result, right in zip(layer.ready()(x, states, None), layer.by_torch(x, states, [B] * 5), strict=True):
        torch.testing.assert_close(result.double(), right, rtol=0, atol=2e-6)
