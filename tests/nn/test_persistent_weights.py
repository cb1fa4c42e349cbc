import copy
import pickle
from typing import Any

import pytest
import torch
from persistent_cases import CELLS, assert_same_bits, convert, make_pruned
from torch import nn

from triton_sparse_rnn.sparse.layer_config import LayerConfig


@pytest.mark.parametrize("cell", CELLS)
def test_sizes_and_options_are_those_of_the_dense_layer(cell):
    layer: Any = make_pruned(cell, num_layers=2, bidirectional=True, batch_first=True, dropout=0.25)
    ours = convert(layer)
    for same in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert LayerConfig.of(same) == LayerConfig.of(layer)
        assert (same.mode, same.hidden_size, same.dropout) == (layer.mode, layer.hidden_size, layer.dropout)


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
