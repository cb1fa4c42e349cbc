"""to_dense of training modules: plain layers of torch.nn for what goes by exact type."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from triton_sparse_rnn import (
    GateGradientSparsity,
    SparseGRU,
    SparseLSTM,
    SparseRNN,
    save_sparse,
    sparsify,
    to_dense,
    to_sparse,
)

PAIRS = [(nn.RNN, SparseRNN), (nn.GRU, SparseGRU), (nn.LSTM, SparseLSTM)]
pairs = pytest.mark.parametrize(("dense_class", "sparse_class"), PAIRS)
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # of nn.LSTM


def zero_columns(module: nn.Module) -> Any:
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "weight" in name:
                weight[:, 1:] = 0
    return module


@pairs
def test_a_training_module_becomes_the_class_of_torch(dense_class, sparse_class):
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.25}
    options |= {nn.RNN: {"nonlinearity": "relu"}, nn.GRU: {}, nn.LSTM: {"proj_size": 2}}[dense_class]
    model = nn.Sequential(nn.Linear(3, 3), sparse_class(3, 5, **options)).eval()
    dense = to_dense(model)
    assert [type(layer) for layer in (model[1], dense[1])] == [sparse_class, dense_class]
    assert repr(dense[1]) == repr(dense_class(3, 5, **options))
    assert vars(dense[1]).keys() == vars(dense_class(3, 5, **options)).keys()
    x = torch.randn(2, 4, 3)
    assert torch.equal(dense(x)[0], model(x)[0])
    assert [(name, value.tolist()) for name, value in dense.state_dict().items()] == [
        (name, value.tolist()) for name, value in model.state_dict().items()
    ]
    assert type(to_dense(model[1])) is dense_class
    assert type(pickle.loads(pickle.dumps(dense[1]))) is type(copy.deepcopy(dense[1])) is dense_class
    dense.train()(x)[0].sum().backward()


def test_what_the_layer_holds_is_taken_over():
    layer: Any = SparseGRU(3, 5)
    layer.weight_hh_l0.requires_grad_(False)
    layer.register_buffer("scale", torch.ones(2))
    layer.note = ["mine"]
    seen = []
    layer.register_forward_hook(lambda module, args, result: seen.append(type(module)))
    layer.eval()
    dense = to_dense(layer)
    assert not dense.training
    assert not dense.weight_hh_l0.requires_grad
    assert dense.weight_ih_l0.requires_grad
    assert dense.note == ["mine"]
    assert dense.scale.tolist() == [1, 1]
    dense(torch.zeros(1, 1, 3))
    layer(torch.zeros(1, 1, 3))
    assert seen == [nn.GRU, SparseGRU]


def test_a_shared_layer_stays_shared_and_others_stay_as_they_are():
    layer = SparseLSTM(3, 3)
    model: Any = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer), "c": nn.GRU(3, 3)})
    dense: Any = to_dense(model)
    assert dense["a"] is dense["b"][0]
    assert [type(module) for module in (dense["a"], dense["c"], model["a"])] == [nn.LSTM, nn.GRU, SparseLSTM]


def test_a_gate_gradient_is_dropped():
    model: Any = nn.Sequential(SparseLSTM(3, 5, gate_gradient=GateGradientSparsity(threshold=1e9)))
    dense = to_dense(model)
    x = torch.randn(4, 2, 3, requires_grad=True)
    dense(x)[0].sum().backward()
    assert x.grad is not None
    assert x.grad.any()  # the layer's own backward zeroes all of it
    assert model[0].gate_gradient is not None


def test_converted_and_training_modules_in_one_model():
    fast = to_sparse(zero_columns(nn.GRU(3, 5)))
    dense = to_dense(nn.ModuleList([fast, SparseRNN(5, 2), nn.LSTM(2, 2)]))
    assert [type(layer) for layer in dense] == [nn.GRU, nn.RNN, nn.LSTM]


class Stateful(SparseGRU):
    def initial_state(self): ...


class Renamed(SparseGRU):
    """Adds nothing."""


def test_a_subclass_with_members_of_its_own_is_left():
    model = nn.ModuleList([Stateful(3, 4), Renamed(3, 4)])
    with pytest.warns(
        UserWarning, match="to_dense left .* '0' is a Stateful, which would lose initial_state"
    ) as caught:
        dense = to_dense(model)
    assert caught[0].filename == __file__
    assert [type(layer) for layer in dense] == [Stateful, nn.GRU]
    with pytest.raises(ValueError, match=r"or sparsify\(\) made, got a Sequential with '0' is a Stateful"):
        to_dense(nn.Sequential(Stateful(3, 4)))
    layer = SparseGRU(2, 2)
    parametrize.register_parametrization(layer, "weight_hh_l0", nn.Identity())
    with pytest.raises(ValueError, match="'' is a ParametrizedSparseGRU, which would lose"):
        to_dense(layer)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # deprecated, and in use
@pytest.mark.parametrize("dense_class", [nn.GRU, nn.LSTM])
def test_dynamic_quantisation_goes_by_exact_type(dense_class):
    from torch.ao.quantization import quantize_dynamic

    model = nn.Sequential(dense_class(3, 5))
    x = torch.randn(4, 2, 3)
    expected = quantize_dynamic(model, {dense_class})(x)[0]
    assert not torch.equal(expected, model(x)[0])
    sparsify(model)
    quantized = quantize_dynamic(to_dense(model), {dense_class})
    assert type(quantized[0]).__module__.startswith("torch.ao.nn.quantized")
    assert torch.equal(quantized(x)[0], expected)


@pytest.mark.parametrize("index", ["columns", "starts"])
def test_wrong_indices_are_neither_made_dense_nor_saved(index, tmp_path):
    gru: Any = nn.GRU(4, 32).requires_grad_(False)
    gru.weight_ih_l0[:, 1:] = gru.weight_hh_l0[:, 1:] = 0
    fast: Any = to_sparse(nn.ModuleDict({"rnn": gru}))
    getattr(fast["rnn"], f"weight_hh_l0_{index}").add_(10**6)
    for use in (to_dense, lambda model: save_sparse(model, tmp_path / "file")):
        with pytest.raises(ValueError, match=r"columns must|starts must"):
            use(fast)
    assert not [*tmp_path.iterdir()]


def test_the_layer_that_is_refused_is_named():
    gru: Any = nn.GRU(4, 32).requires_grad_(False)
    gru.weight_ih_l0[:, 1:] = gru.weight_hh_l0[:, 1:] = 0
    fast: Any = to_sparse(nn.ModuleDict({"rnn": gru}))
    fast["rnn"].forward = lambda x, hx=None: None
    with pytest.raises(ValueError, match="'rnn' cannot be converted: it is a PersistentGRU, which has its own forward"):
        to_dense(fast)
