"""Which linear layers of a model are converted, and what is said of the others."""

import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as prune_utils

from triton_sparse_rnn import (
    OneShot,
    PersistentConv1d,
    PersistentLinear,
    Picks,
    Pruner,
    to_dense,
    to_sparse,
    warm_up,
)

SIZE = 48


def prune(*layers: Any, zeros: float = 0.9) -> None:
    for layer in layers:
        with torch.no_grad():
            for parameter in layer.parameters():
                if parameter.dim() > 1:
                    parameter.masked_fill_(torch.rand(parameter.shape) < zeros, 0)


class Model(nn.Module):
    """Recurrent, pointwise and linear layers, all pruned but for `dense`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, SIZE)
        self.rnn = nn.GRU(SIZE, SIZE, batch_first=True)
        self.mix = nn.Conv1d(SIZE, SIZE, 1)
        self.wide = nn.Conv1d(SIZE, SIZE, 3, padding=1)
        self.fc = nn.Sequential(OrderedDict(one=nn.Linear(SIZE, SIZE), two=nn.Linear(SIZE, SIZE, bias=False)))
        self.dense = nn.Linear(SIZE, 5)
        prune(self.rnn, self.mix, self.wide, self.fc)

    def forward(self, words):
        y = self.rnn(self.embedding(words))[0]
        y = self.wide(self.mix(y.transpose(1, 2))).transpose(1, 2)
        return self.dense(self.fc(y))


def kinds(model: nn.Module) -> dict[str, str]:
    """The classes of the layers that were converted."""
    found = {name: type(module).__name__ for name, module in model.named_modules()}
    return {name: kind for name, kind in found.items() if kind.startswith("Persistent")}


WORDS = torch.arange(10).view(2, 5)
RNN = {"rnn": "PersistentGRU"}
ONE = {"fc.one": "PersistentLinear"}
BOTH = ONE | {"fc.two": "PersistentLinear"}
DENSE = {"dense": "PersistentLinear"}
MIX = {"mix": "PersistentConv1d"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": ()}, RNN),
        ({"include": ("fc.*",)}, RNN | BOTH),
        ({"include": ["*.one.weight", "mix.weight"]}, RNN | MIX | {"fc.one": "PersistentLinear"}),
        ({"include": ("rnn.weight_hh_l0",)}, RNN),
        ({"filter_fn": lambda layer, name: True}, RNN | MIX | BOTH),
        ({"filter_fn": lambda layer, name: name.startswith("fc")}, BOTH),
        ({"filter_fn": lambda layer, name: name != "mix", "include": ("mix.*", "fc.one.*")}, RNN | ONE),
        ({"filter_fn": lambda layer, name: name.startswith(("fc", "de")), "storage": (16, 1)}, BOTH | DENSE),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*there is little to skip")
def test_the_layers_that_are_named(options, expected):
    model = Model().eval()
    fast = to_sparse(model, **options)
    assert kinds(fast) == expected
    torch.testing.assert_close(fast(WORDS), model(WORDS), rtol=0, atol=1e-5)
    assert kinds(model) == {}
    dense = to_dense(fast)
    for name, tensor in model.state_dict().items():
        assert torch.equal(dense.state_dict()[name], tensor)


def test_pruned_layers_that_nobody_named_are_told_of():
    with pytest.warns(
        UserWarning, match=r"'mix', 'fc.one', 'fc.two' are linear layers of mostly zeros: include=\('mix"
    ):
        assert kinds(to_sparse(Model())) == RNN
    model = Model()
    model.fc, model.mix = nn.Sequential(), nn.Conv1d(SIZE, SIZE, 1)
    nn.init.zeros_(model.dense.weight)  # as some begin, and then they are no pruned ones
    assert kinds(to_sparse(model)) == RNN


def test_a_layer_by_itself():
    for layer, kind in ((nn.Linear(SIZE, SIZE), PersistentLinear), (nn.Conv1d(SIZE, SIZE, 1), PersistentConv1d)):
        prune(layer)
        assert type(to_sparse(layer)) is kind
        with pytest.raises(ValueError, match=r"must hold an nn\.RNN"):
            to_sparse(layer, include=())


def test_what_is_named_and_not_pruned_stays_dense():
    with pytest.warns(UserWarning, match="'dense' would be no faster, with 0% zeros: prune more of it, or name"):
        assert kinds(to_sparse(Model(), include=("dense.weight",))) == RNN
    with pytest.warns(UserWarning, match=r"dense.weight is 0% zeros and 100% of the units.*runs as a dense product"):
        assert "dense" in kinds(to_sparse(Model(), include=("dense.weight",), weight_dtype=torch.bfloat16))


def test_what_is_named_and_no_linear_layer():
    match = "'embedding.weight' belongs to Embedding, and only weights of nn.Linear"
    with pytest.warns(UserWarning, match=match):
        assert kinds(to_sparse(Model(), include=("embedding.weight", "mix.*"))) == RNN | MIX
    with pytest.warns(UserWarning, match="'wide.weight' belongs to Conv1d"):
        to_sparse(Model(), include=("wide.*",))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"include": "fc.*"}, TypeError, "include must be a sequence of globs"),
        ({"include": (3,)}, TypeError, "include must be a sequence of globs"),
        ({"include": ("head.*",)}, ValueError, "include has 'head.*', which matches no parameter of two dimensions"),
        ({"include": ("*.bias",)}, ValueError, "which matches no parameter of two dimensions"),
        ({"filter_fn": "fc"}, TypeError, "filter_fn must be callable"),
        ({"filter_fn": lambda layer, name: False}, ValueError, "layers that filter_fn refused"),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        to_sparse(Model(), **options)


def test_the_globs_of_a_pruner_do():
    model = Model()
    names = ("fc.one.weight", "*.two.weight", "mix.weight")
    pruner = Pruner(model, OneShot(sparsity=0.95, step=1), pattern=Picks(), include=names)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner.attach(optimizer)
    model(WORDS).sum().backward()
    optimizer.step()
    fast = to_sparse(model.eval(), include=names)
    assert kinds(fast) == RNN | BOTH | MIX
    assert fast.mix.density <= 0.1
    torch.testing.assert_close(fast(WORDS), model(WORDS), rtol=0, atol=1e-5)


def test_layers_whose_weights_others_read_are_left():
    model = nn.Sequential(nn.TransformerEncoderLayer(SIZE, 2, batch_first=True), nn.Linear(SIZE, SIZE)).eval()
    prune(model)
    names = ("0.linear1.weight", "0.self_attn.out_proj.weight", "1.weight")
    with pytest.warns(UserWarning, match="read by the TransformerEncoderLayer around it"):
        fast = to_sparse(model, include=names)
    assert kinds(fast) == {"1": "PersistentLinear"}
    x = torch.randn(2, 3, SIZE)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-5)


def test_tied_weights_are_converted_one_by_one():
    model = Model()
    model.head = nn.Linear(SIZE, 10, bias=False)
    prune(model.embedding)
    model.head.weight = model.embedding.weight
    fast = to_sparse(model, include=("head.weight",))
    assert kinds(fast) == RNN | {"head": "PersistentLinear"}
    assert torch.equal(fast.head.weight.to_dense(), fast.embedding.weight)


def test_a_shared_layer_stays_shared():
    layer = nn.Linear(SIZE, SIZE)
    prune(layer)
    fast = to_sparse(nn.Sequential(layer, nn.ReLU(), layer), include=("2.weight",))
    assert isinstance(fast[0], PersistentLinear)
    assert fast[0] is fast[2]


def test_classes_that_add_members_are_left():
    class Scaled(nn.Linear):
        def scaled(self, x):
            return 2 * self(x)

    model = nn.Sequential(nn.GRU(SIZE, SIZE), Scaled(SIZE, SIZE))
    prune(model)
    with pytest.warns(UserWarning, match="'1' is a Scaled, which would lose scaled; derive a class from"):
        assert kinds(to_sparse(model, include=("1.weight",))) == {"0": "PersistentGRU"}


def test_a_parametrized_weight_is_converted_as_it_is():
    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    layer = nn.Linear(SIZE, SIZE)
    prune(layer)
    expected = layer.weight.detach() / 2
    nn.utils.parametrize.register_parametrization(layer, "weight", Halved())
    assert torch.equal(to_sparse(layer).weight.to_dense(), expected)
    pruned = prune_utils.random_unstructured(nn.Linear(SIZE, SIZE), "weight", 0.9)
    with pytest.raises(ValueError, match="weight is computed by a hook before each call"):
        to_sparse(pruned)


def test_lazy_layers_are_passed_over():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that lazy layers may change
        model = nn.Sequential(nn.GRU(SIZE, SIZE), nn.LazyLinear(3), nn.LazyConv1d(3, 1))
    prune(model[0])
    assert kinds(to_sparse(model, filter_fn=lambda layer, name: True)) == {"0": "PersistentGRU"}


def test_warm_up_prepares_every_layer():
    fast = to_sparse(Model(), include=("fc.*", "mix.*"))
    warm_up(fast)
    plans = [fast.rnn._plan, fast.mix._plan, fast.fc.one._plan, fast.fc.two._plan]
    assert None not in plans
    fast.eval()(WORDS)
    assert plans == [fast.rnn._plan, fast.mix._plan, fast.fc.one._plan, fast.fc.two._plan]
    with pytest.raises(ValueError, match=r"model must hold a module that to_sparse\(\) made, got a Linear with none"):
        warm_up(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
        warm_up(3)  # type: ignore[arg-type]
