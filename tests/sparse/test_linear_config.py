import pytest
from torch import nn

from triton_sparse_rnn.sparse.layer_config import LayerConfig
from triton_sparse_rnn.sparse.linear_config import LinearConfig, config_of


@pytest.mark.parametrize("layer", [nn.Linear(3, 5), nn.Conv1d(3, 5, 1), nn.Linear(3, 5, bias=False)], ids=str)
def test_a_layer_is_built_again(layer):
    config = LinearConfig.of(layer)
    again = config.build(type(layer))
    assert repr(again) == repr(layer)
    assert [*again.state_dict()] == config.weight_names()
    for name, tensor in again.state_dict().items():
        assert tuple(tensor.flatten(1).shape if tensor.dim() > 1 else tensor.shape) == config.weight_shape(name)


def test_sizes_are_those_that_a_file_holds():
    assert LinearConfig(3, 5, bias=False).sizes() == {"in_features": 3, "out_features": 5, "bias": False}


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [((0, 3), ValueError, "in_features must be at least 1, got 0"), ((3, 2.5), TypeError, "float")],
)
def test_wrong_sizes_are_refused(sizes, error, message):
    with pytest.raises(error, match=message):
        LinearConfig(*sizes)


def test_each_layer_has_its_own_kind():
    assert config_of(nn.Linear(3, 5)) == LinearConfig(3, 5)
    assert config_of(nn.GRU(3, 5)) == LayerConfig.of(nn.GRU(3, 5))
