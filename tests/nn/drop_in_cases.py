"""Pairs of a layer of torch.nn and ours, made alike, and what they are called with."""

import warnings

import pytest
import torch
from layer_pairs import B, H, I, T, identify
from torch import nn

from triton_sparse_rnn import GateGradientSparsity
from triton_sparse_rnn.nn import SparseGRU, SparseLSTM, SparseRNN

CELLS = [(nn.RNN, SparseRNN), (nn.GRU, SparseGRU), (nn.LSTM, SparseLSTM)]
OPTIONS = [
    {},
    {"bias": False},
    {"batch_first": True},
    {"bidirectional": True, "num_layers": 2},
    {"num_layers": 3, "dropout": 0.4, "batch_first": True, "bias": False},
    {"dtype": torch.float64, "bidirectional": True},
    {"dtype": torch.float16},
    {"dtype": torch.bfloat16, "num_layers": 2},
]
LAYERS = [(*cell, options) for cell in CELLS for options in OPTIONS] + [
    (nn.RNN, SparseRNN, {"nonlinearity": "relu", "num_layers": 2}),
    (nn.LSTM, SparseLSTM, {"proj_size": 3, "num_layers": 2, "bidirectional": True, "batch_first": True}),
]
cells = pytest.mark.parametrize(("dense_class", "sparse_class"), CELLS, ids=identify)
layers = pytest.mark.parametrize(("dense_class", "sparse_class", "options"), LAYERS, ids=identify)


def make_pair(dense_class, sparse_class, options=None):
    options = options or {}
    pair = []
    for layer_class in (dense_class, sparse_class):
        torch.manual_seed(0)
        pair.append(layer_class(I, H, **options))
    return pair


def make_each(dense_class, sparse_class, options=None):
    """The pair, and ours as it is with a gate_gradient, where it has one."""
    layers = make_pair(dense_class, sparse_class, options)
    if dense_class is not nn.RNN:
        gate_gradient = GateGradientSparsity(threshold=0.0, backend="reference")
        layers.append(sparse_class(I, H, **(options or {}), gate_gradient=gate_gradient))
    return layers


def outcome(action):
    """What `action` raises (type and message) or says in warnings, and its result."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = action()
        except Exception as error:
            return None, (type(error), str(error))
    return result, [(warning.category, str(warning.message)) for warning in caught]


def random_input(layer, shape=None, seed=1):
    shape = shape or ((B, T, I) if layer.batch_first else (T, B, I))
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(layer.weight_ih_l0.dtype)


def random_state(layer, batch=(B,), seed=2):
    """An h, or for an LSTM an (h, c), that fits; batch=() for an unbatched call."""
    generator = torch.Generator().manual_seed(seed)
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    h = torch.randn(rows, *batch, layer.proj_size or H, generator=generator).to(layer.weight_ih_l0.dtype)
    c = torch.randn(rows, *batch, H, generator=generator).to(h.dtype)
    return (h, c) if layer.mode == "LSTM" else h
