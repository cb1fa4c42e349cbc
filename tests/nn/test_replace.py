from layer_places import make_model
from torch import nn

from triton_sparse_rnn.nn import SparseGRU
from triton_sparse_rnn.nn.replace import added_members, named_recurrent_layers


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
