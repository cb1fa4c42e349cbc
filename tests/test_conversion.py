import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from triton_sparse_rnn import (
    BackendUnavailableError,
    PersistentGRU,
    PersistentLSTM,
    PersistentRNN,
    SparseGRU,
    sparsify,
    to_dense,
    to_sparse,
)

pytestmark = pytest.mark.filterwarnings("ignore:to_sparse left some layers dense. 'cell' is a GRUCell")  # of Places


def zero_columns(module: nn.Module) -> Any:
    """Zero all but the first column of every recurrent and input weight: blocks of any height and one column fit."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "weight_ih" in name or "weight_hh" in name:
                weight[:, 1:] = 0
    return module


class Places(nn.Module):
    """A layer in every place where modules can be."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(3, 3, nonlinearity="relu")
        self.stack = nn.ModuleList([nn.GRU(3, 3, 2, bidirectional=True), nn.Linear(6, 3)])
        self.named = nn.ModuleDict({"lstm": nn.LSTM(3, 3), "again": self.stack[0]})
        self.chain = nn.Sequential(nn.Sequential(SparseGRU(3, 3, batch_first=True)))
        self.by_hand = [self.rnn]
        self.cell = nn.GRUCell(3, 3)
        self.register_buffer("offset", torch.ones(3))

    def forward(self, x):
        x = self.stack[1](self.stack[0](self.rnn(x)[0])[0])
        return self.chain(self.named["lstm"](x)[0])[0] + self.offset


def make_places() -> Any:
    torch.manual_seed(0)
    return zero_columns(Places().eval())


def test_every_layer_is_converted_and_the_original_is_not_touched():
    model = make_places()
    x = torch.randn(5, 2, 3)
    expected = model(x)
    modules, before = list(model.modules()), copy.deepcopy(model.state_dict())
    fast: Any = to_sparse(model)
    assert type(fast) is Places
    assert [type(module) for module in (fast.rnn, fast.named["lstm"], fast.chain[0][0])] == [  # type: ignore[reportIndexIssue]
        PersistentRNN,
        PersistentLSTM,
        PersistentGRU,
    ]
    assert fast.stack[0] is fast.named["again"]
    assert fast.by_hand[0] is fast.rnn
    assert not any(module.training for module in fast.modules())
    torch.testing.assert_close(fast(x), expected)
    assert [id(module) for module in model.modules()] == [id(module) for module in modules]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    model(x).sum().backward()  # it can still be trained
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "cell" not in name)


def test_to_dense_bit_for_bit():
    model = make_places()
    fast: Any = to_sparse(model)
    dense: Any = to_dense(fast)
    assert [type(m) for m in (dense.rnn, dense.stack[0], dense.named["lstm"])] == [nn.RNN, nn.GRU, nn.LSTM]
    assert type(dense.chain[0][0]) is nn.GRU
    assert dense.stack[0] is dense.named["again"]
    assert isinstance(fast.rnn, PersistentRNN)
    state = model.state_dict()
    assert list(dense.state_dict()) == list(state)
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), state[name].view(torch.uint8))
    x = torch.randn(5, 2, 3)
    assert torch.equal(dense(x), model(x))
    assert to_sparse(dense).state_dict().keys() == fast.state_dict().keys()


@pytest.mark.parametrize(
    ("cell", "converted"), [(nn.RNN, PersistentRNN), (nn.GRU, PersistentGRU), (nn.LSTM, PersistentLSTM)]
)
def test_a_layer_by_itself(cell, converted):
    plain = zero_columns(cell(3, 5))
    for layer in (plain, sparsify(zero_columns(cell(3, 5)))):
        fast = to_sparse(layer)
        assert type(fast) is type(layer.to_sparse() if hasattr(layer, "to_sparse") else fast) is converted
        assert type(to_dense(fast)) is cell


def test_options_reach_every_layer():
    options = {"backend": "reference", "activation_dtype": torch.int8, "num_threads": 2}
    fast: Any = to_sparse(make_places(), weight_dtype=torch.int8, storage=(2, 1), **options)
    for module in (fast.rnn, fast.stack[0], fast.named["lstm"]):
        assert module.weight_hh_l0_values.dtype == torch.int8
        assert module.weight_hh_l0_values.shape[1:] == (1, 2)
        assert {name: getattr(module, name) for name in options} == options


class Extended(nn.GRU):
    def reset(self): ...


class Renamed(SparseGRU):
    """Adds nothing."""


def test_a_subclass_with_members_of_its_own_is_left():
    model = zero_columns(nn.ModuleList([Extended(3, 4), Renamed(3, 4)]))
    with pytest.warns(UserWarning, match="left some layers dense: '0' is a Extended, which would lose reset"):
        fast = to_sparse(model)
    assert [type(module) for module in fast] == [Extended, PersistentGRU]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must hold an nn.RNN, .* Extended, which would lose reset"):
        to_sparse(model[0])


def test_cells_stay_dense_and_are_named_in_one_warning():
    model = zero_columns(nn.ModuleDict({"rnn": nn.GRU(3, 4), "a": Extended(3, 4), "b": nn.LSTMCell(3, 4)}))
    model["rest"] = nn.Sequential(nn.RNNCell(3, 4))
    with pytest.warns(UserWarning, match="'a' is a Extended, which would lose reset; derive a class") as caught:
        fast = to_sparse(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    message = str(caught[0].message)
    assert message.startswith(
        "to_sparse left some layers dense: 'a' is a Extended, which would lose reset; derive a class"
    )
    assert ". 'b' is a LSTMCell, a single step without a sparse form; 'rest.0' is a RNNCell, a single" in message
    assert message.endswith("step() advances it by one step")
    assert [type(module) for module in fast.values()][:3] == [PersistentGRU, Extended, nn.LSTMCell]


def test_a_layer_of_one_step_does_what_a_cell_does():
    """As the warning says."""
    cell: Any = zero_columns(nn.GRUCell(3, 4))
    layer = nn.GRU(3, 4)
    layer.load_state_dict({f"{name}_l0": tensor for name, tensor in cell.state_dict().items()})
    x, h = torch.randn(2, 3), torch.randn(2, 4)
    _, new = to_sparse(layer).step(x, h[None])
    torch.testing.assert_close(new[0], cell(x, h), atol=1e-6, rtol=1e-6)


def test_dense_weights_are_converted_with_a_warning():
    layer: Any = nn.GRU(3, 16).eval()
    nn.init.zeros_(layer.weight_hh_l0)
    with pytest.warns(
        UserWarning,
        match="weight_ih_l0 is 0% zeros and 100% of the units of .* stays dense and runs as a dense matrix product",
    ):
        fast = to_sparse(layer)
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(fast(x)[0], layer(x)[0])


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (3, {}, TypeError, "model must be an nn.Module, got int"),
        (nn.ReLU(), {}, ValueError, "model must hold an nn.RNN, nn.GRU or nn.LSTM, or an .* got a ReLU with none"),
        (nn.Linear(2, 2), {}, ValueError, "got a Linear with the layer would be no faster, with 0% zeros"),
        (nn.GRUCell(2, 2), {}, ValueError, "got a GRUCell with '' is a GRUCell, a single step without a sparse form"),
        (nn.GRU(2, 2), {"backend": "gpu"}, ValueError, "backend must be None or one of 'triton', 'cpu', 'reference'"),
        (nn.GRU(2, 2), {"storage": 4}, TypeError, "storage must be two integers"),
        (nn.GRU(2, 2), {"storage": (0, 4)}, ValueError, "storage must be at least"),
        (nn.GRU(2, 2), {"weight_dtype": "half"}, ValueError, "weight_dtype must be one of"),
        (nn.GRU(2, 2), {"weight_dtype": torch.int16}, ValueError, "weight_dtype must be one of .* got torch.int16"),
        (
            nn.GRU(2, 2),
            {"backend": "triton", "weight_dtype": torch.int8},
            BackendUnavailableError,
            "backend 'triton' cannot run this layer",
        ),
        (
            nn.LSTM(2, 2).double(),
            {"backend": "cpu"},
            BackendUnavailableError,
            "in float32.*backend=None takes the fastest",
        ),
        (nn.GRU(2, 2), {"backend": "cpu", "weight_dtype": torch.float64}, BackendUnavailableError, "as torch.float64"),
        (nn.GRU(2, 2), {"activation_dtype": torch.int8}, ValueError, "activation_dtype=torch.int8 needs weights in"),
        (nn.GRU(2, 2), {"num_threads": 1.5}, TypeError, "num_threads must be an integer, got 1.5"),
        (nn.GRU(2, 2, device="meta"), {}, ValueError, "weight_ih_l0 is on the meta device"),
    ],
)
def test_wrong_arguments_of_to_sparse(model, options, error, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these layers have no zeros
        with pytest.raises(error, match=message):
            to_sparse(model, **options)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (None, TypeError, "model must be an nn.Module, got NoneType"),
        (nn.GRU(2, 2), ValueError, r"that to_sparse\(\) or sparsify\(\) made, got a GRU with none"),
    ],
)
def test_wrong_arguments_of_to_dense(model, error, message):
    with pytest.raises(error, match=message):
        to_dense(model)


def test_weight_that_int8_cannot_store():
    layer = zero_columns(nn.GRU(3, 4))
    with torch.no_grad():
        layer.weight_hh_l0[0, 0] = float("nan")
    with pytest.raises(ValueError, match="holds NaN or infinity, which int8 cannot store"):
        to_sparse(layer, weight_dtype=torch.int8)
    assert to_dense(to_sparse(layer)).weight_hh_l0[0, 0].isnan()  # type: ignore[operator]


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.calls = zero_columns(nn.GRU(3, 4)), 0
        self.rnn.register_forward_hook(self.count)
        self.rnn.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, *arguments):
        self.calls += 1

    def forward(self, x):
        return self.rnn(x)


def test_hooks_are_kept_and_act_on_the_copy():
    model = Counting()
    seen = []
    handle = model.rnn.register_forward_hook(lambda module, args, result: seen.append(type(module)))
    model.rnn.register_forward_hook(lambda m, args, kwargs, result: seen.append(kwargs), with_kwargs=True)
    fast: Any = to_sparse(model)
    fast(torch.zeros(1, 1, 3))
    assert seen == [PersistentGRU, {}]
    assert (model.calls, fast.calls) == (0, 2)
    dense: Any = to_dense(fast)
    dense(torch.zeros(1, 1, 3))
    assert seen == [PersistentGRU, {}, nn.GRU, {}]
    assert (model.calls, fast.calls, dense.calls) == (0, 2, 4)
    handle.remove()
    fast(torch.zeros(1, 1, 3))
    model(torch.zeros(1, 1, 3))
    assert seen[4:] == [PersistentGRU, {}, {}]
