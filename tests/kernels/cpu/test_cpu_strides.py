"""Weights at any address, and narrow inputs, on their way through ops/backends/cpu.prepare_layer."""

import dataclasses

import pytest
import torch
from cpu_layers import MODES, RAGGED, Layer
from rounding import assert_same_sums

from triton_sparse_rnn.ops.backends import cpu
from triton_sparse_rnn.ops.layer_weights import StoredLayer
from triton_sparse_rnn.sparse.picks import Picks


def offset(tensor):
    """Contiguous, and at an address that no vector would choose."""
    memory = torch.full((tensor.numel() + 16,), torch.nan)
    memory = memory[1 + (-memory.data_ptr() // 4) % 16 :][: tensor.numel()]
    assert memory.data_ptr() % 64 == 4
    return memory.copy_(tensor.flatten()).view(tensor.shape)


def prepared(layer, dtype=torch.float32):
    return cpu.prepare_layer(StoredLayer(layer.mode, layer.directions, dtype, torch.device("cpu")), 1)


@pytest.mark.parametrize("block_ih", [(5, 3), Picks(16, 32), Picks(8, 64), None], ids=str)
@pytest.mark.parametrize("H", [37, 40])
def test_weights_at_any_address(block_ih, H):
    """They are contiguous (ops/validation.py), but need not begin where vectors would."""
    layer = Layer("GRU", 21, H, block_ih, (4, 3))
    x, states = layer.random_inputs([3] * 4)
    expected = layer.ready()(x, states, None)
    layer.directions = [
        direction._replace(
            weight_ih=moved(direction.weight_ih),
            weight_hh=moved(direction.weight_hh),
            bias_ih=offset(direction.bias_ih),
            bias_hh=offset(direction.bias_hh),
        )
        for direction in layer.directions
    ]
    ours = prepared(layer)(x, states, None)
    if block_ih:
        assert all(map(torch.equal, ours, expected))
    else:  # torch's product rounds in another order for other addresses
        assert_same_sums(ours, expected, 21 + H + 2)


def moved(weight):
    if isinstance(weight, torch.Tensor):
        return offset(weight)
    columns = torch.cat([weight.columns[:1], weight.columns])[1:]
    picks = weight.picks
    if picks is not None:
        picks = torch.cat([picks.new_zeros(1), picks.flatten()])[1:].view(picks.shape)
        assert picks.data_ptr() % 2 == 1
    return dataclasses.replace(weight, values=offset(weight.values), columns=columns, picks=picks)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_inputs_are_computed_in_float32(mode, dtype):
    layer = Layer(mode, 21, 37, (5, 3), (4, 3))
    x, states = layer.random_inputs(RAGGED)
    x, states, sizes = x.to(dtype), [state.to(dtype) for state in states], torch.tensor(RAGGED)
    results = prepared(layer, dtype)(x, states, sizes)
    wide = layer.ready()(x.float(), [state.float() for state in states], sizes)
    for result, right in zip(results, wide, strict=True):
        assert result.dtype == dtype
        assert torch.equal(result, right.to(dtype))
