import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from triton_sparse_rnn.nn import SparseGRU, SparseLSTM, SparseRNN

PAIRS = [(nn.RNN, SparseRNN), (nn.GRU, SparseGRU), (nn.LSTM, SparseLSTM)]
pairs = pytest.mark.parametrize(("dense_class", "sparse_class"), PAIRS)
LAYERS = [
    *[(*pair, {}) for pair in PAIRS],
    *[(*pair, {"num_layers": 2, "bias": False, "batch_first": True, "dropout": 0.5}) for pair in PAIRS],
    *[(*pair, {"num_layers": 3, "bidirectional": True, "dtype": torch.float64}) for pair in PAIRS],
    (nn.RNN, SparseRNN, {"nonlinearity": "relu"}),
    (nn.LSTM, SparseLSTM, {"proj_size": 2, "bidirectional": True}),
]


@pytest.mark.parametrize(("dense_class", "sparse_class", "options"), LAYERS)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # says torch's own
def test_from_dense_shares_parameters(dense_class, sparse_class, options):
    dense = dense_class(3, 5, **options).eval()
    dense.weight_hh_l0.requires_grad_(False)
    before = torch.get_rng_state()
    sparse = sparse_class.from_dense(dense)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(sparse) is sparse_class
    assert repr(sparse) == "Sparse" + repr(dense)
    assert sparse.mode == dense.mode
    assert not sparse.training
    names = [name for name, _ in dense.named_parameters()]
    assert [name for name, _ in sparse.named_parameters()] == names
    assert all(getattr(sparse, name) is getattr(dense, name) for name in names)
    assert not sparse.weight_hh_l0.requires_grad
    x = torch.randn(4, 2, 3, dtype=dense.weight_hh_l0.dtype)
    assert torch.equal(sparse(x)[0], dense(x)[0])


@pairs
def test_optimizer_made_before_trains_both(dense_class, sparse_class):
    dense = dense_class(3, 5)
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    sparse = sparse_class.from_dense(dense)
    x = torch.randn(4, 2, 3)
    before = sparse(x)[0]
    before.sum().backward()
    optimizer.step()
    assert not torch.equal(sparse(x)[0], before)
    assert torch.equal(sparse(x)[0], dense(x)[0])


@pairs
def test_new_parameter_of_one_is_not_the_others(dense_class, sparse_class):
    dense = dense_class(3, 5)
    sparse, weight = sparse_class.from_dense(dense), dense.weight_hh_l0
    sparse.weight_hh_l0 = nn.Parameter(torch.zeros_like(weight))
    assert dense.weight_hh_l0 is weight
    assert dense._flat_weights[1] is weight


@pairs
def test_hooks_and_additions_come_along(dense_class, sparse_class):
    dense, seen = dense_class(3, 5), []
    handle = dense.register_forward_hook(lambda module, args, result: seen.append(module))
    dense.register_buffer("scale", torch.ones(1))
    dense.gain = nn.Parameter(torch.ones(1))
    dense.note = ["mine"]
    sparse = sparse_class.from_dense(dense)
    assert (sparse.scale is dense.scale, sparse.gain is dense.gain, sparse.note is dense.note) == (True,) * 3
    sparse(torch.zeros(1, 1, 3))
    assert seen == [sparse]
    handle.remove()
    sparse(torch.zeros(1, 1, 3))
    assert seen == [sparse, sparse]
    dense(torch.zeros(1, 1, 3))
    assert seen == [sparse, sparse]


@pairs
def test_from_training_module(dense_class, sparse_class):
    class Named(sparse_class):
        def name(self):
            return "mine"

    first = sparse_class(3, 5)
    assert sparse_class.from_dense(first).weight_hh_l0 is first.weight_hh_l0
    second = Named.from_dense(first)
    assert second.name() == "mine"
    assert Named.from_dense(second).weight_hh_l0 is first.weight_hh_l0
    with pytest.raises(TypeError, match=f"{sparse_class.__name__}.from_dense: .* got a Named, which would lose name"):
        sparse_class.from_dense(second)


@pairs
def test_dropout_in_one_layer_warns_once(dense_class, sparse_class):
    with pytest.warns(UserWarning, match="dropout option adds dropout"):
        dense = dense_class(3, 5, dropout=0.5)
    assert sparse_class.from_dense(dense).dropout == 0.5


@pairs
def test_tied_layers_stay_tied(dense_class, sparse_class):
    dense = dense_class(5, 5, num_layers=2)
    dense.weight_hh_l1 = dense.weight_hh_l0
    sparse = sparse_class.from_dense(dense)
    assert sparse.weight_hh_l1 is sparse.weight_hh_l0 is dense.weight_hh_l0


@pairs
def test_wrong_class(dense_class, sparse_class):
    for wrong in (nn.LSTM(3, 5) if dense_class is nn.GRU else nn.GRU(3, 5), nn.GRUCell(3, 5), None):
        with pytest.raises(TypeError) as caught:
            sparse_class.from_dense(wrong)
        message = f"{sparse_class.__name__}.from_dense: dense must be an nn.{dense_class.__name__}, got a "
        assert str(caught.value) == message + type(wrong).__name__
    with pytest.raises(
        TypeError, match=f"dense must be an nn.{dense_class.__name__}, got the class {dense_class.__name__}"
    ):
        sparse_class.from_dense(dense_class)


@pairs
def test_weights_that_are_no_parameters(dense_class, sparse_class):
    parametrized = dense_class(3, 5)
    parametrize.register_parametrization(parametrized, "weight_hh_l0", nn.Identity())
    with pytest.raises(TypeError, match=r"which would lose .*weight_hh_l0; .* undo its parametrization first"):
        sparse_class.from_dense(parametrized)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and in use
        normed = nn.utils.weight_norm(dense_class(3, 5), "weight_hh_l0")
    with pytest.raises(ValueError, match=r"dense must hold the parameters weight_ih_l0, .*undo weight norm"):
        sparse_class.from_dense(normed)
    overriding = dense_class(3, 5)
    overriding.forward = lambda *args: None
    with pytest.raises(TypeError, match=r"without members of its own, got .* own forward set on the layer itself"):
        sparse_class.from_dense(overriding)


@pairs
def test_options_of_to_sparse(dense_class, sparse_class):
    layer = sparse_class(3, 4).requires_grad_(False)
    for weight in (layer.weight_ih_l0, layer.weight_hh_l0):
        weight[:, 1:] = 0
    given = {"backend": "reference", "activation_dtype": torch.int8, "num_threads": 2}
    ours = layer.to_sparse(weight_dtype=torch.int8, storage=(2, 1), **given)
    assert {name: getattr(ours, name) for name in given} == given
    assert ours.weight_hh_l0_values.shape[1:] == (1, 2)
    assert ours.weight_hh_l0_values.dtype == torch.int8


@pairs
def test_hooks_that_take_a_module_get_the_new_one(dense_class, sparse_class):
    dense, seen = dense_class(3, 4), []
    dense.register_load_state_dict_pre_hook(lambda module, *others: seen.append(module))
    layer = sparse_class.from_dense(dense)
    layer.load_state_dict(layer.state_dict())
    dense.load_state_dict(dense.state_dict())
    assert seen == [layer, dense]
