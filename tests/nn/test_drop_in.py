"""Every behaviour that code written for nn.RNN, nn.GRU or nn.LSTM relies on: a training module must show the same.

Each test does the same thing to torch's layer and to ours, and compares results to the bit, or the exceptions. What
they hold, and who uses them, is in test_drop_in_state.py.
"""

import copy
import warnings

import pytest
import torch
from drop_in_cases import LAYERS, OPTIONS, cells, layers, make_each, make_pair, outcome, random_input, random_state
from layer_pairs import B, H, I, T, assert_same, identify, tensors_of
from processor import skip_where_torch_cannot_autocast
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from triton_sparse_rnn.nn import SparseGRU, SparseLSTM, SparseRNN

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # says torch's own

FORMS = ["batched", "state", "one step", "list", "unbatched", "unbatched state", "strided", "no rows"]
# Every form of a call with every options of some cell, and with every cell of some options.
CALLS = [
    (*layer, form) for number, layer in enumerate(LAYERS) for form in FORMS[(number + number // len(OPTIONS)) % 2 :: 2]
]


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
        ids=identify,
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
    def test_meta_device_to_empty_and_assign(self, dense_class, sparse_class, options):
        dense, _ = make_pair(dense_class, sparse_class, options)
        sparse = sparse_class(I, H, **options, device="meta")
        assert all(parameter.is_meta for parameter in sparse.parameters())
        x, state = random_input(dense), {name: value.clone() for name, value in dense.state_dict().items()}
        assert sparse(x.to("meta"))[0].shape == dense(x)[0].shape
        assigned = copy.deepcopy(sparse)
        assigned.load_state_dict(state, assign=True)
        assert assigned.weight_hh_l0.data_ptr() == state["weight_hh_l0"].data_ptr()
        sparse.to_empty(device="cpu").load_state_dict(state)
        for layer in (sparse, assigned):
            assert_same(layer.eval()(x), dense.eval()(x))
        with torch.device("meta"):
            assert sparse_class(I, H).weight_hh_l0.is_meta


class TestCall:
    @pytest.mark.parametrize(("dense_class", "sparse_class", "options", "form"), CALLS, ids=identify)
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
        for layer in make_each(dense_class, sparse_class, {"batch_first": batch_first}):
            h = None if state is None else torch.zeros(state)
            h = (h, h) if h is not None and layer.mode == "LSTM" else h
            complaints.append(outcome(lambda layer=layer, h=h: layer(torch.zeros(x), h)))
        theirs, ours, *gated = complaints
        assert ours == theirs
        assert theirs[0] is None
        for _, (kind, message) in gated:  # says "4D tensor", as torch does of nn.RNN alone
            assert (kind, message.replace("D tensor instead", "D instead")) == theirs[1]

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
            lambda layer: layer(torch.zeros(T, B, I), (torch.zeros(1, B, H), None)),
            lambda layer: layer(torch.zeros(T, B, I), (torch.zeros(1, B, H), torch.zeros(1, B, H + 1))),
            lambda layer: layer(torch.zeros(T, B, I), "state"),
            lambda layer: layer(pack_padded_sequence(torch.zeros(T, B, I + 1), [5, 4, 3])),
            lambda layer: layer(pack_padded_sequence(torch.zeros(T, B, I), [5, 4, 3]), torch.zeros(1, B + 1, H)),
            lambda layer: layer(torch.zeros(T, B, I, device="meta")),
        ],
    )
    def test_same_errors_on_arguments(self, dense_class, sparse_class, call):
        theirs, ours, *gated = (
            outcome(lambda layer=layer: call(layer)) for layer in make_each(dense_class, sparse_class)
        )
        assert ours == theirs
        assert all(result is None for result, _ in (theirs, *gated))

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
