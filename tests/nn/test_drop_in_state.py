"""What a training module holds, as code written for nn.RNN, nn.GRU or nn.LSTM relies on it, and who uses it how."""

import copy
import io
import pickle

import pytest
import torch
from drop_in_cases import CELLS, cells, layers, make_pair, random_input
from layer_pairs import B, H, I, T, assert_same
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from triton_sparse_rnn.nn import SparseGRU, SparseLSTM, SparseRNN

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # says torch's own


class TestState:
    @layers
    def test_state_dict_both_ways(self, dense_class, sparse_class, options):
        dense, sparse = make_pair(dense_class, sparse_class, options)
        theirs, ours = dense.state_dict(), sparse.state_dict()
        assert list(ours) == list(theirs) == [name for name, _ in sparse.named_parameters()]
        assert dict(ours._metadata) == dict(theirs._metadata)
        x = random_input(dense)
        for source, target in ((dense, sparse_class(I, H, **options)), (sparse, dense_class(I, H, **options))):
            target.load_state_dict(source.state_dict(), strict=True)
            assert_same(target.eval()(x), source.eval()(x))

    @cells
    def test_load_errors(self, dense_class, sparse_class):
        dense, sparse = make_pair(dense_class, sparse_class)
        larger = dense_class(I, H + 1, num_layers=2).state_dict()
        messages = []
        for layer in (dense, sparse):
            with pytest.raises(RuntimeError) as caught:
                layer.load_state_dict(larger)
            messages.append(str(caught.value))
        assert messages[1] == messages[0].replace(f"for {dense_class.__name__}", f"for {sparse_class.__name__}")

    @layers
    def test_weight_lists(self, dense_class, sparse_class, options):
        dense, sparse = make_pair(dense_class, sparse_class, options)
        names = {id(parameter): name for name, parameter in sparse.named_parameters()}
        assert [names[id(weight)] for weight in sparse._flat_weights] == dense._flat_weights_names
        assert [[names[id(weight)] for weight in weights] for weights in sparse.all_weights] == dense._all_weights
        assert sparse.flatten_parameters() is None

    @cells
    def test_replaced_weights_are_used(self, dense_class, sparse_class):
        layer = sparse_class(I, H)
        x, new = random_input(layer), torch.randn_like(layer.weight_hh_l0)
        expected = functional_call(layer, {"weight_hh_l0": new}, (x,))
        assert not torch.equal(layer(x)[0], expected[0])
        layer.weight_hh_l0 = nn.Parameter(new)
        assert_same(layer(x), expected)
        del layer.weight_hh_l0
        layer.weight_hh_l0 = new * 2  # a plain tensor, as weight norm leaves it
        state = {**layer.state_dict(), "weight_hh_l0": new * 2}
        assert_same(layer(x), functional_call(sparse_class(I, H), state, (x,)))

    @cells
    def test_parametrize(self, dense_class, sparse_class):
        class Half(nn.Module):
            def forward(self, weight):
                return weight / 2

        dense, sparse = make_pair(dense_class, sparse_class)
        for layer in (dense, sparse):
            parametrize.register_parametrization(layer, "weight_hh_l0", Half())
        assert isinstance(sparse, sparse_class)
        assert list(sparse.state_dict()) == list(dense.state_dict())
        assert_same(sparse(random_input(sparse)), dense(random_input(dense)))
        parametrize.remove_parametrizations(sparse, "weight_hh_l0")
        assert type(sparse) is sparse_class
        assert_same(sparse(random_input(sparse)), dense(random_input(dense)))

    @cells
    @pytest.mark.parametrize("copied", ["deepcopy", "pickle", "save", "copy"])
    def test_copies(self, dense_class, sparse_class, copied):
        layer = sparse_class(I, H, num_layers=2, dropout=0.5).eval()
        layer.weight_hh_l0.requires_grad_(False)
        if copied == "save":
            buffer = io.BytesIO()
            torch.save(layer, buffer)
            buffer.seek(0)
            twin = torch.load(buffer, weights_only=False)
        else:
            twin = {
                "deepcopy": copy.deepcopy,
                "pickle": lambda module: pickle.loads(pickle.dumps(module)),
                "copy": copy.copy,
            }[copied](layer)
        assert type(twin) is sparse_class
        assert repr(twin) == repr(layer)
        assert not twin.training
        assert not twin.weight_hh_l0.requires_grad
        assert (twin.weight_hh_l0 is layer.weight_hh_l0) == (copied == "copy")
        assert_same(twin(random_input(layer)), layer(random_input(layer)))

    @cells
    def test_state_dict_file_with_weights_only(self, dense_class, sparse_class):
        buffer = io.BytesIO()
        dense, sparse = make_pair(dense_class, sparse_class)
        torch.save(sparse.state_dict(), buffer)
        buffer.seek(0)
        dense.load_state_dict(torch.load(buffer, weights_only=True))

    @cells
    def test_share_memory(self, dense_class, sparse_class):
        dense, sparse = make_pair(dense_class, sparse_class)
        assert sparse.share_memory() is sparse
        assert all(parameter.is_shared() for parameter in sparse.parameters())
        assert_same(sparse(random_input(sparse)), dense(random_input(dense)))

    @cells
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
    def test_change_of_dtype(self, dense_class, sparse_class, dtype):
        dense, sparse = make_pair(dense_class, sparse_class)
        dense.to(dtype)
        sparse.to(dtype)
        assert_same(sparse(random_input(sparse)), dense(random_input(dense)))

    @cells
    def test_hooks_and_modes(self, dense_class, sparse_class):
        layer, calls = sparse_class(I, H), []
        layer.register_forward_pre_hook(lambda module, args: calls.append("before"))
        layer.register_forward_hook(lambda module, args, result: calls.append("after"))
        layer.register_full_backward_hook(lambda module, grad_input, grad_output: calls.append("backward"))
        layer(random_input(layer).requires_grad_())[0].sum().backward()
        assert calls == ["before", "after", "backward"]
        assert layer.eval() is layer
        assert not layer.training
        assert layer.train().training

    @cells
    def test_same_training_run(self, dense_class, sparse_class):
        pair = make_pair(dense_class, sparse_class, {"num_layers": 2})
        for layer in pair:
            optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
            for _ in range(3):
                layer.flatten_parameters()  # as some libraries call it
                optimizer.zero_grad()
                layer(random_input(layer))[0].square().sum().backward()
                optimizer.step()
        dense, sparse = (layer.state_dict() for layer in pair)
        assert all(torch.equal(sparse[name], dense[name]) for name in dense)


class OwnBase(nn.Module):
    """A base class like those that libraries give to all their layers."""

    def describe(self):
        return f"{type(self).__name__} of {self.hidden_size}"


class OwnRNN(OwnBase, SparseRNN):
    pass


class OwnGRU(OwnBase, SparseGRU):
    pass


class OwnLSTM(OwnBase, SparseLSTM):
    pass


class TestConsumers:
    @cells
    def test_is_an_instance(self, dense_class, sparse_class):
        layer = sparse_class(I, H)
        assert isinstance(layer, dense_class)
        assert isinstance(layer, nn.RNNBase)
        assert not any(isinstance(layer, other) for other, _ in CELLS if other is not dense_class)

    @cells
    def test_patched_torch(self, dense_class, sparse_class, monkeypatch):
        monkeypatch.setattr(nn, dense_class.__name__, sparse_class)
        layer = getattr(torch.nn, dense_class.__name__)(I, H, 2, batch_first=True)
        assert type(layer) is sparse_class
        assert layer(random_input(layer))[0].shape == (B, T, H)
        assert type(sparse_class.from_dense(dense_class(I, H))) is sparse_class
        assert type(pickle.loads(pickle.dumps(layer))) is sparse_class

    @pytest.mark.parametrize(("own_class", "dense_class"), [(OwnRNN, nn.RNN), (OwnGRU, nn.GRU), (OwnLSTM, nn.LSTM)])
    def test_own_base(self, own_class, dense_class):
        dense, own = make_pair(dense_class, own_class)
        assert own.describe() == f"{own_class.__name__} of {H}"
        assert_same(own(random_input(own)), dense(random_input(dense)))
        assert type(copy.deepcopy(own)) is own_class
        assert type(own_class.from_dense(dense)) is own_class
