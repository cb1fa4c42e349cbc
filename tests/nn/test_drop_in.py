"""Every behaviour that code written for nn.RNN, nn.GRU or nn.LSTM relies on: a training module must show the same.

Each test does the same thing to torch's layer and to ours, and compares results to the bit, or the exceptions.
"""

import copy
import io
import pickle
import warnings

import pytest
import torch
from processor import skip_where_torch_cannot_autocast
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from triton_sparse_rnn.nn import SparseGRU, SparseLSTM, SparseRNN

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # says torch's own

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
FORMS = ["batched", "state", "one step", "list", "unbatched", "unbatched state", "strided", "no rows"]
# Every form of a call with every options of some cell, and with every cell of some options.
CALLS = [
    (*layer, form) for number, layer in enumerate(LAYERS) for form in FORMS[(number + number // len(OPTIONS)) % 2 :: 2]
]
T, B, I, H = 5, 3, 4, 7


def _identify(value):
    return value.__name__ if isinstance(value, type) else str(value)


cells = pytest.mark.parametrize(("dense_class", "sparse_class"), CELLS, ids=_identify)
layers = pytest.mark.parametrize(("dense_class", "sparse_class", "options"), LAYERS, ids=_identify)


def make_pair(dense_class, sparse_class, options=None):
    options = options or {}
    pair = []
    for layer_class in (dense_class, sparse_class):
        torch.manual_seed(0)
        pair.append(layer_class(I, H, **options))
    return pair


def tensors_of(value):
    """Every tensor of a call's result, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [] if value is None else [tensor for part in value for tensor in tensors_of(part)]


def assert_same(actual, expected):
    assert type(actual) is type(expected)
    actual, expected = tensors_of(actual), tensors_of(expected)
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        assert torch.equal(ours, theirs)


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


class TestConstruction:
    @layers
    def test_same_weights_from_same_seed(self, dense_class, sparse_class, options):
        states = []
        for layer_class in (dense_class, sparse_class):
            torch.manual_seed(3)
            states.append((layer_class(I, H, **options).state_dict(), torch.get_rng_state()))
        (dense, dense_rng), (sparse, sparse_rng) = states
        assert list(sparse) == list(dense)
        assert all(torch.equal(sparse[name], dense[name]) and sparse[name].dtype == dense[name].dtype for name in dense)
        assert torch.equal(sparse_rng, dense_rng)

    @pytest.mark.parametrize(
        ("dense_class", "sparse_class", "arguments"),
        [
            (nn.RNN, SparseRNN, (I, H, 2, "relu", False, True, 0.25, True)),
            (nn.GRU, SparseGRU, (I, H, 2, False, True, 0.25, True)),
            (nn.LSTM, SparseLSTM, (I, H, 2, False, True, 0.25, True, 3, "cpu", torch.float64)),
        ],
        ids=_identify,
    )
    def test_positional_order(self, dense_class, sparse_class, arguments):
        for count in range(2, len(arguments) + 1):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                dense, sparse = dense_class(*arguments[:count]), sparse_class(*arguments[:count])
            for name in ("mode", *dense.__constants__):
                assert getattr(sparse, name) == getattr(dense, name)
            assert sparse.weight_ih_l0.dtype == dense.weight_ih_l0.dtype

    @cells
    @pytest.mark.parametrize(
        "arguments",
        [
            {"proj_size": 0},
            {"proj_size": -1},
            {"proj_size": H},
            {"input_size": 0},
            {"input_size": 2.0},
            {"input_size": None},
            {"hidden_size": -1},
            {"hidden_size": "8"},
            {"num_layers": 0},
            {"bias": 1},
            {"batch_first": "yes"},
            {"dropout": 1.5},
            {"dropout": -0.1},
            {"dropout": True},
            {"dropout": "0.1"},
            {"dropout": 0.1},
            {"dropout": 0.1, "num_layers": 2},
            {"nonlinearity": "selu"},
            {"bidirectoinal": True},
        ],
        ids=str,
    )
    def test_same_complaints(self, dense_class, sparse_class, arguments):
        arguments = {"input_size": I, "hidden_size": H} | arguments
        _, theirs = outcome(lambda: dense_class(**arguments))
        _, ours = outcome(lambda: sparse_class(**arguments))
        assert ours == theirs

    @layers
    def test_repr(self, dense_class, sparse_class, options):
        dense, sparse = make_pair(dense_class, sparse_class, options)
        assert repr(sparse) == repr(dense).replace(dense_class.__name__, sparse_class.__name__, 1)

    @layers
    def test_meta_device_and_to_empty(self, dense_class, sparse_class, options):
        dense, _ = make_pair(dense_class, sparse_class, options)
        sparse = sparse_class(I, H, **options, device="meta")
        assert all(parameter.is_meta for parameter in sparse.parameters())
        assert sparse(random_input(dense).to("meta"))[0].shape == dense(random_input(dense))[0].shape
        sparse.to_empty(device="cpu").load_state_dict(dense.state_dict())
        assert_same(sparse.eval()(random_input(dense)), dense.eval()(random_input(dense)))

    @cells
    def test_default_device(self, dense_class, sparse_class):
        with torch.device("meta"):
            assert sparse_class(I, H).weight_hh_l0.is_meta


class TestCall:
    @pytest.mark.parametrize(("dense_class", "sparse_class", "options", "form"), CALLS, ids=_identify)
    def test_same_result_and_gradients(self, dense_class, sparse_class, options, form):
        results = []
        for layer in make_pair(dense_class, sparse_class, options):
            x, state = random_input(layer), None
            if form == "state":
                state = random_state(layer)
            elif form == "one step":
                x = random_input(layer, (B, 1, I) if layer.batch_first else (1, B, I))
            elif form == "list":
                state = list(random_state(layer)) if layer.mode == "LSTM" else random_state(layer)
            elif form.startswith("unbatched"):
                x, state = random_input(layer, (T, I)), random_state(layer, ()) if "state" in form else None
            elif form == "strided":
                x = x.flip(-1).transpose(0, 1).contiguous().transpose(0, 1)
                state = random_state(layer)
                strided = [h.repeat_interleave(2, dim=-1)[..., ::2] for h in tensors_of(state)]
                state = tuple(strided) if layer.mode == "LSTM" else strided[0]
            elif form == "no rows":
                x = x[:0] if layer.batch_first else x[:, :0]
            inputs = [x.requires_grad_(), *(h.requires_grad_() for h in tensors_of(state))]
            torch.manual_seed(4)  # of dropout
            result = layer(x, state)
            torch.stack([tensor.float().sum() for tensor in tensors_of(result)]).sum().backward()
            gradients = [tensor.grad for tensor in [*inputs, *layer.parameters()]]
            results.append((result, gradients))
        (dense, dense_gradients), (sparse, sparse_gradients) = results
        assert_same(sparse, dense)
        assert_same(sparse_gradients, dense_gradients)

    @layers
    @pytest.mark.parametrize("with_state", [False, True], ids=["", "state"])
    @pytest.mark.parametrize("sort", [False, True], ids=["unsorted", "sorted"])
    def test_packed(self, dense_class, sparse_class, options, with_state, sort):
        dense, sparse = make_pair(dense_class, sparse_class, options)
        rows = [random_input(dense, (length, I), seed=length) for length in ((5, 4, 1) if sort else (1, 5, 4))]
        packed = pack_sequence(rows, enforce_sorted=sort)
        state = random_state(dense) if with_state else None
        theirs, ours = dense.eval()(packed, state), sparse.eval()(packed, state)
        assert isinstance(ours[0], PackedSequence)
        assert_same(ours, theirs)

    @cells
    def test_output_is_a_view_when_batch_first(self, dense_class, sparse_class):
        layer = sparse_class(I, H, batch_first=True, bidirectional=True)
        y, state = layer(random_input(layer))
        assert y.transpose(0, 1).is_contiguous()
        assert all(h.is_contiguous() for h in tensors_of(state))

    @cells
    @pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch_first"])
    @pytest.mark.parametrize(
        ("x", "state"),
        [
            ((T, B, I, 1), None),
            ((I,), None),
            ((T, B, I + 2), None),
            ((T, I - 1), None),
            ((0, 0, I), None),
            ((0, I), None),
            ((T, B, I), (2, B, H)),
            ((T, B, I), (1, B + 1, H)),
            ((T, B, I), (1, B, H + 1)),
            ((T, B, I), (1, H)),
            ((T, I), (1, B, H)),
            ((T, I), (2, H)),
        ],
        ids=str,
    )
    def test_same_errors_on_shapes(self, dense_class, sparse_class, batch_first, x, state):
        complaints = []
        for layer in make_pair(dense_class, sparse_class, {"batch_first": batch_first}):
            h = None if state is None else torch.zeros(state)
            h = (h, h) if h is not None and layer.mode == "LSTM" else h
            complaints.append(outcome(lambda layer=layer, h=h: layer(torch.zeros(x), h)))
        assert complaints[1] == complaints[0]
        assert complaints[1][0] is None

    @cells
    @pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch_first"])
    def test_no_time_steps(self, dense_class, sparse_class, batch_first):
        layer = sparse_class(I, H, batch_first=batch_first)
        with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
            layer(torch.zeros((B, 0, I) if batch_first else (0, B, I)))

    @cells
    @pytest.mark.parametrize(
        "call",
        [
            lambda layer: layer(),
            lambda layer: layer(None),
            lambda layer: layer(torch.zeros(T, B, I), torch.zeros(1, B, H), torch.zeros(1, B, H)),
            lambda layer: layer(torch.zeros(T, B, I, dtype=torch.float64)),
            lambda layer: layer(torch.zeros(T, B, I, dtype=torch.int64)),
            lambda layer: layer(torch.zeros(T, B, I, dtype=torch.bfloat16)),
            lambda layer: layer(torch.zeros(T, B, I), torch.zeros(1, B, H, dtype=torch.float64)),
            lambda layer: layer(torch.zeros(T, B, I), (torch.zeros(1, B, H),)),
            lambda layer: layer(torch.zeros(T, B, I), (torch.zeros(1, B, H), torch.zeros(1, B, H + 1))),
            lambda layer: layer(torch.zeros(T, B, I), "state"),
            lambda layer: layer(pack_padded_sequence(torch.zeros(T, B, I + 1), [5, 4, 3])),
            lambda layer: layer(pack_padded_sequence(torch.zeros(T, B, I), [5, 4, 3]), torch.zeros(1, B + 1, H)),
            lambda layer: layer(torch.zeros(T, B, I, device="meta")),
        ],
    )
    def test_same_errors_on_arguments(self, dense_class, sparse_class, call):
        dense, sparse = make_pair(dense_class, sparse_class)
        assert outcome(lambda: call(sparse)) == outcome(lambda: call(dense))
        assert outcome(lambda: call(sparse))[0] is None

    @cells
    def test_dropout_acts_in_training_only(self, dense_class, sparse_class):
        layer = sparse_class(I, H, num_layers=2, dropout=0.5)
        x = random_input(layer)
        assert not torch.equal(layer(x)[0], layer(x)[0])
        assert torch.equal(layer.eval()(x)[0], layer(x)[0])

    @cells
    def test_autocast(self, dense_class, sparse_class):
        skip_where_torch_cannot_autocast(dense_class)
        dense, sparse = make_pair(dense_class, sparse_class)
        with torch.autocast("cpu", torch.bfloat16):
            theirs, ours = dense(random_input(dense)), sparse(random_input(sparse))
        assert_same(ours, theirs)
        assert ours[0].dtype == (torch.float32 if dense_class is nn.GRU else torch.bfloat16)

    @cells
    def test_inference_mode_and_double_backward(self, dense_class, sparse_class):
        dense, sparse = make_pair(dense_class, sparse_class, {"dtype": torch.float64})
        with torch.inference_mode():
            assert_same(sparse(random_input(sparse)), dense(random_input(dense)))
        x = random_input(sparse, (2, 2, I)).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: sparse(x)[0], x)
        assert torch.autograd.gradgradcheck(lambda x: sparse(x)[0], x)


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
    def test_load_with_assign(self, dense_class, sparse_class, options):
        dense, _ = make_pair(dense_class, sparse_class, options)
        sparse = sparse_class(I, H, **options, device="meta")
        state = {name: value.clone() for name, value in dense.state_dict().items()}
        sparse.load_state_dict(state, assign=True)
        assert sparse.weight_hh_l0.data_ptr() == state["weight_hh_l0"].data_ptr()
        assert_same(sparse.eval()(random_input(dense)), dense.eval()(random_input(dense)))

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
    def test_in_place_zeros_are_seen(self, dense_class, sparse_class):
        dense, sparse = make_pair(dense_class, sparse_class)
        for layer in (dense, sparse):
            with torch.no_grad():
                layer.weight_hh_l0[:, ::2] = 0
        assert_same(sparse(random_input(sparse)), dense(random_input(dense)))

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

    @cells
    def test_children_swapped_by_exact_type(self, dense_class, sparse_class):
        model = nn.Sequential(nn.Linear(I, I), dense_class(I, H))
        x = torch.randn(T, B, I)
        expected = model(x)
        for name, child in list(model.named_children()):
            if type(child) is dense_class:
                swapped = sparse_class(child.input_size, child.hidden_size)
                swapped.load_state_dict(child.state_dict())
                setattr(model, name, swapped)
        assert_same(model(x), expected)

    @cells
    def test_flattened_before_every_call(self, dense_class, sparse_class):
        dense, sparse = make_pair(dense_class, sparse_class)
        for _ in range(2):
            sparse.flatten_parameters()
            assert_same(sparse(random_input(sparse)), dense(random_input(dense)))
