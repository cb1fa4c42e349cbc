import pytest
import torch
from torch import nn

from triton_sparse_rnn import SparseGRU, SparseRNN
from triton_sparse_rnn.sparse.layer_config import LayerConfig


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
    again = config.build(type(layer), device="meta", dtype=torch.float64)
    assert LayerConfig.of(again) == config
    assert ", ".join(config.shown()) == layer.extra_repr() == again.extra_repr()
    assert all(weight.is_meta and weight.dtype == torch.float64 for weight in again.parameters())


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"mode": "QRNN"}, ValueError, "mode must be one of RNN_TANH, RNN_RELU, GRU, LSTM, got 'QRNN'"),
        ({"proj_size": -1}, ValueError, "proj_size must be at least 0, got -1"),
        ({"hidden_size": "4"}, TypeError, "str"),
        ({"mode": []}, TypeError, "unhashable"),
    ],
)
def test_what_no_layer_has(wrong, error, message):
    with pytest.raises(error, match=message):
        LayerConfig(**{"mode": "GRU", "input_size": 3, "hidden_size": 4, **wrong})
