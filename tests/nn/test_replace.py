from typing import Any

import torch
from torch import nn

from triton_sparse_rnn.nn import SparseGRU
from triton_sparse_rnn.nn.replace import added_members, named_recurrent_layers


class Places(nn.Module):
    """A layer in every place where modules can be: attribute, list, dict, sequential, shared, plain list."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(2, 3)
        self.absent = None
        self.stack = nn.ModuleList([nn.GRU(2, 3), nn.Linear(3, 2)])
        self.named = nn.ModuleDict({"lstm": nn.LSTM(2, 3), "again": self.stack[0]})
        self.chain = nn.Sequential(nn.Sequential(nn.GRU(2, 3)))
        self.same_chain = self.chain
        self.cell = nn.GRUCell(2, 3)
        self.by_hand = [self.rnn]
        self.scale = torch.ones(1)
        self.register_buffer("offset", torch.zeros(1))


def make_model() -> Any:  # not Places: for a type checker its submodules may be tensors
    return Places()


def test_every_layer_is_found_once():
    model = make_model()
    found = named_recurrent_layers(model)
    assert list(found) == ["rnn", "stack.0", "named.lstm", "chain.0.0"]
    assert all(model.get_submodule(name) is layer for name, layer in found.items())
    assert named_recurrent_layers(model.rnn) == {"": model.rnn}
    assert named_recurrent_layers(nn.Linear(2, 2)) == {}


def test_added_members():
    class Plain(nn.GRU):
        """Adds nothing that lives on."""

        size: int

        def __init__(self, size):
            super().__init__(size, size)

    class Mixin:
        limit = 3

    class Other(Mixin, Plain):
        def forward(self, input, hx=None):
            return super().forward(input, hx)

        @property
        def width(self):
            return self.hidden_size

    assert added_members(nn.GRU(2, 3), nn.GRU) == []
    assert added_members(Plain(2), nn.GRU) == []
    assert added_members(Other(2), nn.GRU) == ["forward", "limit", "width"]
    assert added_members(Other(2), Other) == []
    assert "from_dense" in added_members(SparseGRU(2, 3), nn.GRU)
