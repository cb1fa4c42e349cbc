import copy
import functools
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from triton_sparse_rnn.nn import SparseGRU, SparseLSTM, SparseRNN
from triton_sparse_rnn.nn.sparsify import sparsify

PAIRS = [(nn.RNN, SparseRNN), (nn.GRU, SparseGRU), (nn.LSTM, SparseLSTM)]
pairs = pytest.mark.parametrize(("dense_class", "sparse_class"), PAIRS)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.stack = nn.ModuleList([nn.GRU(4, 4), nn.RNN(4, 4, nonlinearity="relu")])
        self.heads = nn.ModuleDict({"left": nn.Sequential(nn.LSTM(4, 6, proj_size=2)), "right": nn.GRUCell(4, 6)})
        self.shared = self.stack[0]

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in (*self.stack, self.shared, *self.heads["left"].children()):
            x = layer(x)[0]
        return x


class Stateful(nn.GRU):
    """Adds a method that its owner calls."""

    def initial_state(self):
        return torch.zeros(self.num_layers, 1, self.hidden_size)


class Square(nn.GRU):
    """Its constructor is all that it adds."""

    def __init__(self, size):
        super().__init__(size, size)
        self.created_by = "Square"


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # says torch's own
def test_every_layer_everywhere():
    model: Any = Tagger()
    state, tokens = copy.deepcopy(model.state_dict()), torch.arange(11).view(-1, 1)
    expected, parameters, modules = model(tokens), list(model.parameters()), list(model.modules())
    assert sparsify(model) is model
    assert [type(layer) for layer in model.stack] == [SparseGRU, SparseRNN]
    assert type(model.heads["left"][0]) is SparseLSTM
    assert type(model.heads["right"]) is nn.GRUCell
    assert model.shared is model.stack[0]
    assert all(new is old for new, old in zip(model.modules(), modules, strict=True))
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(state)
    Tagger().load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(state, strict=True)
    assert torch.equal(model(tokens), expected)


@pairs
def test_layer_by_itself(dense_class, sparse_class):
    layer = sparsify(dense_class(3, 5, num_layers=2, bidirectional=True))
    assert type(layer) is sparse_class
    assert type(pickle.loads(pickle.dumps(layer))) is sparse_class
    assert type(copy.deepcopy(layer)) is sparse_class
    assert repr(layer) == f"Sparse{dense_class.__name__}(3, 5, num_layers=2, bidirectional=True)"


@pairs
def test_hooks_stay_and_their_handles_work(dense_class, sparse_class):
    layer, calls = dense_class(3, 5), []

    def note(name, *args, **kwargs):
        calls.append(name)

    hooks = {
        "pre": layer.register_forward_pre_hook,
        "forward": layer.register_forward_hook,
        "backward pre": layer.register_full_backward_pre_hook,
        "backward": layer.register_full_backward_hook,
        "state pre": layer.register_state_dict_pre_hook,
        "state": layer.register_state_dict_post_hook,
        "load pre": layer.register_load_state_dict_pre_hook,
        "load": layer.register_load_state_dict_post_hook,
    }
    handles = [register(functools.partial(note, name)) for name, register in hooks.items()]

    def use_all():
        calls.clear()
        layer(torch.zeros(2, 1, 3, requires_grad=True))[0].sum().backward()
        layer.load_state_dict(layer.state_dict())
        return calls

    expected = list(use_all())
    assert sorted(expected) == sorted(hooks)
    sparsify(layer)
    assert use_all() == expected
    for handle in handles:
        handle.remove()
    assert use_all() == []


@pairs
def test_what_the_layer_holds_stays(dense_class, sparse_class):
    layer = dense_class(3, 5).eval()
    layer.register_buffer("scale", torch.ones(2))
    layer.register_buffer("scratch", torch.ones(2), persistent=False)
    layer.extra = nn.Linear(2, 2)
    layer.note = ["mine"]
    layer.bias_hh_l0.requires_grad_(False)
    layer.weight_hh_l0.grad = gradient = torch.ones_like(layer.weight_hh_l0)
    held = dict(vars(layer))
    sparsify(layer)
    assert list(vars(layer)) == list(held)
    assert all(vars(layer)[name] is value for name, value in held.items())
    assert not layer.training
    assert not layer.bias_hh_l0.requires_grad
    assert layer.weight_hh_l0.grad is gradient
    assert list(layer.state_dict())[-3:] == ["scale", "extra.weight", "extra.bias"]


@pairs
def test_existing_optimizer_goes_on(dense_class, sparse_class):
    def train(swap):
        torch.manual_seed(0)
        layer = dense_class(3, 5)
        optimizer = torch.optim.Adam(layer.parameters())
        for step in range(4):
            if swap and step == 2:
                sparsify(layer)
            optimizer.zero_grad()
            layer(torch.ones(2, 1, 3))[0].sum().backward()
            optimizer.step()
        return layer.state_dict()

    plain, swapped = train(False), train(True)
    assert all(torch.equal(swapped[name], plain[name]) for name in plain)


def test_filter():
    model, asked = Tagger(), []

    def take(layer, name):
        asked.append((name, type(layer)))
        return name.startswith("stack") and layer.mode == "GRU"

    sparsify(model, take)
    assert asked == [("stack.0", nn.GRU), ("stack.1", nn.RNN), ("heads.left.0", nn.LSTM)]  # the shared one once
    assert [type(layer) for layer in model.stack] == [SparseGRU, nn.RNN]
    sparsify(model, filter_fn=lambda layer, name: name == "stack.1")
    assert [type(layer) for layer in model.stack] == [SparseGRU, SparseRNN]


def test_name_of_a_root_is_empty():
    assert type(sparsify(nn.GRU(2, 2), lambda layer, name: name == "")) is SparseGRU


def test_a_filter_that_raises_changes_nothing():
    model = Tagger()
    with pytest.raises(ZeroDivisionError):
        sparsify(model, lambda layer, name: name == "stack.0" or bool(1 / 0))
    assert [type(layer) for layer in model.stack] == [nn.GRU, nn.RNN]


def test_training_modules_count_as_matched():
    class Mine(SparseGRU):
        def forward(self, input, hx=None):
            return super().forward(input, hx)

    model = nn.Sequential(SparseGRU(2, 2), Mine(2, 2))
    assert sparsify(sparsify(model)) is model
    assert [type(layer) for layer in model] == [SparseGRU, Mine]
    with pytest.raises(ValueError, match="with '0', '1', all refused by filter_fn"):
        sparsify(model, lambda layer, name: False)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.GRUCell(2, 2), nn.Sequential()], ids=str)
def test_nothing_matched(model):
    with pytest.raises(ValueError, match=r"must hold an nn.RNN, nn.GRU or nn.LSTM") as caught:
        sparsify(model)
    found = "'' is a GRUCell, a single step without a sparse form" if isinstance(model, nn.GRUCell) else "none"
    assert str(caught.value).endswith(f"got a {type(model).__name__} with {found}")


def test_not_a_module():
    layers: Any = {"rnn": nn.GRU(2, 2)}
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got dict"):
        sparsify(layers)


def test_subclass_that_adds_nothing_is_swapped():
    layer = sparsify(Square(3))
    assert type(layer) is SparseGRU
    assert layer.created_by == "Square"


def test_subclass_that_would_lose_something_is_left():
    model = nn.ModuleDict({"first": Stateful(2, 2), "second": nn.GRU(2, 2)})
    with pytest.warns(UserWarning, match="'first' is a Stateful, which would lose initial_state; derive") as caught:
        sparsify(model)
    assert caught[0].filename == __file__
    assert type(model["first"]) is Stateful
    assert type(model["second"]) is SparseGRU


def test_only_left_layers_is_an_error():
    with pytest.raises(ValueError, match="got a Sequential with '0' is a Stateful, which would lose initial_state"):
        sparsify(nn.Sequential(Stateful(2, 2)))


def test_parametrized_layer_is_left_and_works():
    model = nn.Sequential(nn.GRU(2, 2), nn.GRU(2, 2))
    parametrize.register_parametrization(model[0], "weight_hh_l0", nn.Identity())
    with pytest.warns(UserWarning, match="'0' is a ParametrizedGRU, which would lose .*weight_hh_l0"):
        sparsify(model)
    assert parametrize.is_parametrized(model[0])
    assert type(model[1]) is SparseGRU
    parametrize.remove_parametrizations(model[0], "weight_hh_l0")
    assert type(sparsify(model)[0]) is SparseGRU


def test_parametrized_training_module_is_kept():
    layer = SparseGRU(2, 2)
    parametrize.register_parametrization(layer, "weight_hh_l0", nn.Identity())
    assert sparsify(layer) is layer
    assert parametrize.is_parametrized(layer)


def test_weight_norm_goes_on():
    torch.manual_seed(0)
    layer: Any
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and in use
        layer = nn.utils.weight_norm(nn.GRU(2, 2), "weight_hh_l0")
    x = torch.randn(3, 1, 2)
    expected = layer(x)[0]
    sparsify(layer)
    assert torch.equal(layer(x)[0], expected)
    with torch.no_grad():
        layer.weight_hh_l0_g.mul_(2)
    assert not torch.equal(layer(x)[0], expected)
    nn.utils.remove_weight_norm(layer, "weight_hh_l0")
    assert type(layer) is SparseGRU


def test_compiled_models():
    inner = nn.Sequential(nn.GRU(2, 2))
    model: Any = torch.compile(inner, backend="eager")
    x = torch.randn(3, 1, 2)
    expected = model(x)[0]
    assert sparsify(model) is model
    assert type(inner[0]) is SparseGRU
    assert torch.equal(model(x)[0], expected)
    layer: Any = torch.compile(nn.GRU(2, 2), backend="eager")
    sparsify(layer)
    assert type(layer._orig_mod) is SparseGRU
    assert torch.equal(layer(x)[0], layer._orig_mod(x)[0])


def test_data_parallel_wrapper():
    model = nn.DataParallel(nn.GRU(2, 2))
    assert type(sparsify(model).module) is SparseGRU


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # deprecated, and in use
def test_quantized_layers_are_not_ours():
    from torch.ao.nn.quantized import dynamic

    quantized = dynamic.GRU(2, 2)
    model = nn.Sequential(quantized, nn.GRU(2, 2))
    sparsify(model)
    assert model[0] is quantized
    assert type(model[1]) is SparseGRU


def test_reference_from_a_plain_list():
    layer = nn.LSTM(2, 2)
    kept = [layer]
    sparsify(nn.Sequential(layer))
    assert type(kept[0]) is SparseLSTM
