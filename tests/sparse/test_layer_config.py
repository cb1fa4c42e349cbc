import dataclasses
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from triton_sparse_rnn import SparseGRU, SparseRNN
from triton_sparse_rnn.sparse.layer_config import LayerConfig

FACTORY = {"device": "meta", "dtype": torch.float64}


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("proj_size", [0, 2])
def test_weights_are_those_of_torch_nn_in_its_order(num_layers, bias, bidirectional, proj_size):
    layer = nn.LSTM(3, 4, num_layers, bias=bias, bidirectional=bidirectional, proj_size=proj_size)
    config = LayerConfig.of(layer)
    assert config.weight_names() == [name for name, _ in layer.named_parameters()]
    assert [name for k in range(num_layers) for name in config.weight_names(k)] == config.weight_names()
    assert all(config.weight_shape(name) == weight.shape for name, weight in layer.named_parameters())
    if bidirectional and not proj_size:
        _, (h, c) = layer(torch.zeros(1, 1, 3))
        assert (h.shape[0], h.shape[2], c.shape[2]) == (num_layers * config.directions, *config.state_sizes)


LAYERS = [
    nn.GRU(3, 4, 2, bias=False, batch_first=True, bidirectional=True, dropout=0.5),
    nn.LSTM(3, 4, proj_size=2),
    nn.RNN(3, 4, nonlinearity="relu"),
    SparseGRU(3, 4, batch_first=True),
    SparseRNN(3, 4),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_layer_is_built_again(layer):
    config = LayerConfig.of(layer)
    again = config.build(type(layer), **FACTORY)
    assert LayerConfig.of(again) == config
    assert repr(again) == repr(layer)
    assert ", ".join(config.shown()) == layer.extra_repr()
    assert LayerConfig(**config.sizes()) == dataclasses.replace(config, batch_first=False, dropout=0.0)
    assert all(weight.is_meta and weight.dtype == torch.float64 for weight in again.parameters())


def test_dropout_in_one_layer_is_warned_of_once():
    with pytest.warns(UserWarning, match="dropout option adds dropout"):
        config = LayerConfig.of(nn.GRU(3, 4, dropout=0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config.build(nn.GRU, **FACTORY).dropout == 0.5


def test_numbers_of_numpy_become_plain():
    config = LayerConfig("GRU", 3, 4, num_layers=np.int64(2), dropout=np.float32(0.25), bias=np.bool_(True))  # type: ignore[arg-type, reportArgumentType]
    assert config == LayerConfig("GRU", 3, 4, num_layers=2, dropout=0.25)
    assert [type(value) for value in (config.num_layers, config.dropout, config.bias)] == [int, float, bool]


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"mode": "QRNN"}, ValueError, "mode must be one of RNN_TANH, RNN_RELU, GRU, LSTM, got 'QRNN'"),
        ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1, got 0"),
        ({"num_layers": -1}, ValueError, "num_layers must be at least 1, got -1"),
        ({"proj_size": -1}, ValueError, "proj_size must be at least 0, got -1"),
        ({"hidden_size": "4"}, TypeError, "str"),
        ({"input_size": 3.0}, TypeError, "float"),
        ({"mode": []}, TypeError, "unhashable"),
    ],
)
def test_what_no_layer_has(wrong, error, message):
    with pytest.raises(error, match=message):
        LayerConfig(**{"mode": "GRU", "input_size": 3, "hidden_size": 4, **wrong})
