import collections
import threading
from typing import Any

import pytest
import torch
from torch import nn

from triton_sparse_rnn.nn import SparseGRU
from triton_sparse_rnn.nn.replace import (
    added_members,
    copy_with_replacements,
    named_recurrent_layers,
    replace_modules,
)


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


PLACES = ["rnn", "stack.0", "named.lstm", "named.again", "chain.0.0", "same_chain.0.0"]


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


def test_replaced_under_every_name():
    model = make_model()
    new = {name: nn.Identity() for name in ("rnn", "named.lstm", "named.again", "same_chain.0.0")}
    names = {**new, "stack.0": new["named.again"], "chain.0.0": new["same_chain.0.0"]}
    assert replace_modules(model, new) is model
    assert all(model.get_submodule(name) is names[name] for name in PLACES)
    assert named_recurrent_layers(model) == {}
    assert [name for name, _ in model.named_children()][:3] == ["rnn", "stack", "named"]  # the order is kept


def test_replaced_root():
    layer, new = nn.GRU(2, 3), nn.Identity()
    assert replace_modules(layer, {"": new}) is new
    assert copy_with_replacements(layer, {"": new}) is new


def test_nothing_is_replaced_after_an_error():
    model = make_model()
    model.stack[1] = torch.compile(nn.LSTM(2, 3), backend="eager")
    before = list(model.modules())
    with pytest.raises(AttributeError, match="has no attribute `gru`"):
        replace_modules(model, {"rnn": nn.Identity(), "gru": nn.Identity()})
    with pytest.raises(ValueError, match=r"torch.compile\(...\) right around stack.1._orig_mod"):
        replace_modules(model, {"rnn": nn.Identity(), "stack.1._orig_mod": nn.Identity()})
    assert list(model.modules()) == before


def test_copy_shares_tensors_and_leaves_the_model():
    model = make_model()
    model.scale = model.scale * nn.Parameter(torch.ones(1))  # as weight norm leaves it; deepcopy alone would refuse
    before = list(model.modules())
    new = {"rnn": nn.Linear(1, 1), "named.again": nn.Linear(1, 1)}
    copied: Any = copy_with_replacements(model, new)
    assert list(model.modules()) == before
    assert copied.rnn is copied.by_hand[0] is new["rnn"]
    assert copied.stack[0] is copied.named["again"] is new["named.again"]
    assert copied.chain is copied.same_chain is not model.chain
    assert copied.scale is model.scale
    assert copied.offset is model.offset
    for name in ("cell", "named.lstm", "chain.0.0", "stack.1"):
        ours, theirs = copied.get_submodule(name), model.get_submodule(name)
        assert ours is not theirs
        assert all(a is b for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert torch.equal(copied.chain(torch.ones(1, 1, 2))[0], model.chain(torch.ones(1, 1, 2))[0])
    with pytest.raises(AttributeError, match="has no attribute `gru`"):
        copy_with_replacements(model, {"gru": nn.Identity()})


def test_copy_shares_tensors_in_containers():
    model = make_model()
    hidden = [torch.ones(2) * nn.Parameter(torch.ones(1)) for _ in range(7)]  # deepcopy alone would refuse each
    model.cell.hidden = [hidden[0], (hidden[1], {"c": [hidden[2]]}), {hidden[3]}]
    model.cell.hidden.append(model.cell.hidden)
    model.recent = collections.deque([hidden[4]], maxlen=3)
    model.by_hand = [nn.Identity()]
    model.by_hand[0].last = hidden[5]
    model.names = {hidden[6]: "last"}
    copied: Any = copy_with_replacements(model, {"rnn": nn.Identity()})
    ours, theirs = copied.cell.hidden, model.cell.hidden
    assert ours is ours[3] is not theirs
    assert ours[1][1] is not theirs[1][1]
    found = [ours[0], ours[1][0], ours[1][1]["c"][0], *ours[2], *copied.recent, copied.by_hand[0].last, *copied.names]
    assert all(a is b for a, b in zip(found, hidden, strict=True))
    assert copied.recent is not model.recent
    assert copied.by_hand[0] is not model.by_hand[0]


def test_what_cannot_be_copied_is_named():
    model = make_model()
    model.rnn.lock = threading.Lock()  # goes with the layer that is replaced
    assert copy_with_replacements(model, {"rnn": nn.Identity()}).rnn is not model.rnn
    model.stack[1].state = {"guard": threading.Lock()}
    message = r"model cannot be copied: model.stack.1.state holds a dict \(cannot pickle .*lock.* object\). Convert the"
    with pytest.raises(TypeError, match=message):
        copy_with_replacements(model, {"rnn": nn.Identity()})
    del model.stack[1].state
    model.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"model.lock holds a lock"):
        copy_with_replacements(model, {"rnn": nn.Identity()})


def test_a_module_that_refuses_to_be_copied_says_so_itself():
    class Single(nn.Module):
        def __deepcopy__(self, memo):
            raise RuntimeError("there is only one")

    with pytest.raises(RuntimeError, match="there is only one"):
        copy_with_replacements(nn.Sequential(nn.GRU(2, 3), Single()), {"0": nn.Identity()})


def test_copied_hooks_act_on_the_copy():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.inner, self.calls = nn.GRU(2, 3), nn.Identity(), 0
            self.inner.register_forward_hook(self.count)

        def count(self, module, args, result):
            self.calls += 1

        def forward(self, x):
            return self.rnn(self.inner(x))

    model = Counting()
    copied: Any = copy_with_replacements(model, {"rnn": nn.Identity()})
    copied(torch.ones(1, 1, 2))
    assert (copied.calls, model.calls) == (1, 0)


def test_copy_reaches_into_compiled_modules():
    compiled: Any = torch.compile(nn.GRU(2, 3), backend="eager")
    model = nn.Sequential(compiled)
    copied = copy_with_replacements(model, {"0._orig_mod": nn.Identity()})
    x = torch.ones(1, 1, 2)
    assert torch.equal(copied(x), x)
    assert model(x)[0].shape == (1, 1, 3)
