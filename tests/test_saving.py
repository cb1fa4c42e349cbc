from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from saved_models import Model, assert_refused, forge, make_gru, make_model, prepare
from torch import nn

from triton_sparse_rnn import BackendUnavailableError, SparseGRU, load_sparse, save_sparse, to_dense, to_sparse
from triton_sparse_rnn.nn.persistent import PersistentLayer

TOKENS = torch.tensor([[1, 2], [3, 4], [8, 0]])


@pytest.mark.parametrize("weight_dtype", [None, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("build", [make_model, lambda seed: make_model(seed, cell=SparseGRU), "sparse"])
def test_saved_and_loaded(tmp_path, build, weight_dtype):
    path = tmp_path / "a model"
    sparse = prepare(path, weight_dtype=weight_dtype)
    fresh: Any = to_sparse(make_model(1), storage=(2, 1)) if build == "sparse" else build(seed=1)
    parameters = dict(fresh.named_parameters())
    loaded: Any = load_sparse(fresh, str(path))
    assert loaded is fresh
    assert loaded.rnn is loaded.rnn_again
    assert isinstance(loaded.rnn, PersistentLayer)
    assert loaded.head.weight is loaded.embedding.weight is parameters["embedding.weight"]
    assert list(loaded.state_dict()) == list(sparse.state_dict())
    for ours, theirs in zip(loaded.state_dict().values(), sparse.state_dict().values(), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert torch.equal(loaded(TOKENS), sparse(TOKENS))
    save_sparse(loaded, path)  # over the file it came from
    assert torch.equal(load_sparse(make_model(2), path)(TOKENS), sparse(TOKENS))


@pytest.mark.parametrize("cell", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_layer_by_itself(tmp_path, cell, dtype):
    options = {"num_layers": 2, "bidirectional": True, "bias": False, "dtype": dtype}
    layer = cell(4, 6, **options).requires_grad_(False)
    for weight in layer.parameters():
        weight[:, 1:] = 0
    sparse = to_sparse(layer, storage=(2, 1))
    save_sparse(sparse, tmp_path / "layer")
    fresh = cell(4, 6, **options)
    loaded: Any = load_sparse(fresh, tmp_path / "layer")
    assert isinstance(loaded, PersistentLayer)
    assert loaded.dtype == dtype
    x = torch.randn(3, 2, 4, dtype=dtype)
    assert torch.equal(loaded(x)[0], sparse(x)[0])
    assert all(torch.equal(a, b) for a, b in zip(to_dense(loaded).parameters(), layer.parameters(), strict=True))


def test_the_file_is_plain_safetensors_and_smaller(tmp_path):
    sparse = prepare(tmp_path / "file")
    plain = load_file(tmp_path / "file")
    assert torch.equal(plain["embedding.weight"], sparse.embedding.weight)
    assert "head.weight" not in plain  # it is embedding.weight
    assert not any(name.startswith("rnn_again.") and tensor.numel() for name, tensor in plain.items())
    assert plain["narrow"].dtype == torch.bfloat16


def test_unconverted_subclasses_stay(tmp_path):
    class Stateful(nn.GRU):
        def reset(self): ...

    model = make_model(cell=Stateful)
    with pytest.warns(UserWarning, match="left some layers dense"):
        prepare(tmp_path / "file", model)
    loaded: Any = load_sparse(make_model(1, cell=Stateful), tmp_path / "file")
    assert type(loaded.rnn) is Stateful
    assert torch.equal(loaded.rnn.state_dict()["weight_hh_l0"], model.rnn.weight_hh_l0)


RELU = {"cell": nn.RNN, "nonlinearity": "relu"}


@pytest.mark.parametrize(
    ("options", "of_the_file", "message"),
    [
        ({"hidden_size": 7}, None, "holds 'rnn' with hidden_size=6, the model's has 7"),
        ({"layers": 1}, None, "holds 'rnn' with num_layers=2, the model's has 1"),
        ({"bias": False}, None, "holds 'rnn' with bias=True, the model's has False"),
        ({"bidirectional": True}, None, "holds 'rnn' with bidirectional=False, the model's has True"),
        ({"cell": nn.LSTM}, None, "a PersistentGRU 'rnn', where the model has a LSTM; build the model with nn.GRU"),
        ({"cell": nn.RNN}, None, "where the model has a RNN"),
        ({"cell": nn.RNN}, RELU, "with mode=RNN_RELU, the model's has RNN_TANH"),
        ({"dtype": torch.float64}, None, r"'rnn' in float32, the model's is in float64; .* .to\(torch.float32\)"),
    ],
)
def test_another_architecture_is_refused(tmp_path, options, of_the_file, message):
    prepare(tmp_path / "file", make_model(**(of_the_file or {})))
    assert_refused(tmp_path / "file", message, make_model(1, **options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.register_buffer("extra", torch.zeros(3)), "holds another model: without extra. Nothing"),
        (lambda model: model.__delattr__("flags"), "with flags, which the model does not have"),
        (
            lambda model: model.embedding.double(),
            r"with embedding.weight in torch.float32, the model's is in .*float64",
        ),
        (lambda model: model.register_buffer("flags", torch.ones(2)), "with flags in torch.bool, .* in torch.float32"),
        (lambda model: model.flags.resize_(3), r"with flags of shape \(2,\), the model's has \(3,\)"),
        (lambda model: model.__delattr__("rnn"), "holds a PersistentGRU 'rnn', which the model does not have"),
        (lambda model: model.__delattr__("stack"), "holds a PersistentLSTM 'stack.0', which the model does not have"),
        (lambda model: setattr(model, "rnn_again", nn.GRU(4, 7)), "with hidden_size=6"),
        (lambda model: setattr(model, "rnn", nn.GRUCell(4, 6)), "where the model has a GRUCell"),
        (lambda model: model.register_module("more", nn.GRU(2, 2)), "without more.bias_hh_l0"),
        (lambda model: setattr(model, "norm", nn.BatchNorm1d(3)), r"norm.bias of shape \(2,\), .* \(3,\)"),
        (
            lambda model: setattr(model, "rnn", torch.compile(nn.Linear(4, 6), backend="eager")),
            "'rnn', where the model has a Linear; build the model with nn.GRU there",
        ),
    ],
)
def test_other_tensors_are_refused(tmp_path, change, message):
    prepare(tmp_path / "file")
    model = make_model(1)
    change(model)
    assert_refused(tmp_path / "file", message, model)


def test_tensors_that_are_one_in_the_model_only(tmp_path):
    model = make_model()
    model.head.weight = nn.Parameter(torch.zeros(9, 4))
    prepare(tmp_path / "file", model)
    assert_refused(tmp_path / "file", "with different embedding.weight and head.weight, which are one tensor")
    model = make_model()
    model.rnn_again = nn.GRU(4, 6, 2).requires_grad_(False)
    for name, weight in model.rnn_again.named_parameters():
        if "weight" in name:
            weight[:, 1:] = 0
    prepare(tmp_path / "file", model)
    assert_refused(tmp_path / "file", "with different rnn.weight_ih_l0_values and rnn_again.weight_ih_l0_values")
    apart = make_model(1)
    apart.rnn_again = nn.GRU(4, 6, 2)
    prepare(tmp_path / "file")  # one layer in the file may become two in the model
    assert load_sparse(apart, tmp_path / "file").rnn_again is not apart.rnn


def test_the_meta_device_is_refused(tmp_path):
    prepare(tmp_path / "file")
    with torch.device("meta"):
        model = Model()
    with pytest.raises(ValueError, match="model has 'flags' on the meta device"):
        load_sparse(model, tmp_path / "file")


def test_a_named_backend_of_a_converted_model_is_kept_or_refused(tmp_path):
    gru = make_gru()
    for name, weight_dtype in (("float", None), ("double", torch.float64)):
        save_sparse(to_sparse(gru, storage=(2, 1), weight_dtype=weight_dtype), tmp_path / name)
    model = to_sparse(gru, storage=(2, 1), backend="cpu")
    assert load_sparse(model, tmp_path / "float").backend == "cpu"
    assert_refused(tmp_path / "double", "backend 'cpu' cannot run this layer", model, BackendUnavailableError)


def test_quantized_activations_are_saved_and_what_runs_them_is_not(tmp_path):
    narrow = {"storage": (2, 1), "weight_dtype": torch.int8, "activation_dtype": torch.int8}
    sparse: Any = to_sparse(make_gru(), **narrow, num_threads=3, backend="reference")
    save_sparse(sparse, tmp_path / "file")
    x = torch.randn(5, 2, 4)
    loaded: Any = load_sparse(make_gru(1), tmp_path / "file")
    assert (loaded.activation_dtype, loaded.num_threads, loaded.backend) == (torch.int8, 1, None)
    torch.testing.assert_close(loaded(x)[0], sparse(x)[0], rtol=0, atol=0.01)  # integers may round the other way
    converted: Any = load_sparse(to_sparse(make_gru(1), storage=(2, 1), num_threads=2), tmp_path / "file")
    assert (converted.activation_dtype, converted.num_threads) == (torch.int8, 2)
    save_sparse(to_sparse(make_gru(), storage=(2, 1), weight_dtype=torch.int8), tmp_path / "plain")
    plain: Any = load_sparse(to_sparse(make_gru(1), **narrow), tmp_path / "plain")
    assert plain.activation_dtype is None


@pytest.mark.filterwarnings("ignore:.*little to skip")
@pytest.mark.parametrize("dense_in_the_model", [True, False])
def test_a_dense_input_weight_is_saved(tmp_path, dense_in_the_model):
    sparse: Any = to_sparse(make_gru(zeroed=["weight_hh_l0"]))
    save_sparse(sparse, tmp_path / "file")
    assert "weight_ih_l0" in load_file(tmp_path / "file")
    x = torch.randn(5, 2, 4)
    zeroed = ["weight_hh_l0"] if dense_in_the_model else ["weight_ih_l0", "weight_hh_l0"]
    fresh: Any
    for fresh in (make_gru(1, zeroed), to_sparse(make_gru(1, zeroed), storage=(2, 1))):
        loaded: Any = load_sparse(fresh, tmp_path / "file")
        assert torch.equal(loaded.weight_ih_l0, sparse.weight_ih_l0)
        assert torch.equal(loaded(x)[0], sparse(x)[0])
    for change, message in (
        (lambda t: t.update(weight_ih_l0=torch.zeros(18, 5)), r"weight_ih_l0 is torch.float32 of shape \(18, 5\)"),
        (lambda t: t.update(weight_ih_l0=torch.zeros(18, 4).half()), "weight_ih_l0 is torch.float16"),
    ):
        forge(tmp_path / "file", change)
        assert_refused(tmp_path / "file", message, make_gru(1))


def test_a_model_that_raises_while_it_takes_tensors_is_restored(tmp_path):
    prepare(tmp_path / "file")
    model = make_model(1)

    def refuse(module, keys):
        raise OverflowError("no room")

    model.register_load_state_dict_post_hook(refuse)
    assert_refused(tmp_path / "file", "no room", model, OverflowError)


def test_a_model_that_raises_while_layers_are_replaced_is_restored(tmp_path):
    sparse: Any = to_sparse(make_model(), storage=(2, 1))
    model = make_model(1)
    model.rnn.register_forward_hook(lambda module, args, result: None)
    for compiled in (sparse, model):
        compiled.rnn = compiled.rnn_again = torch.compile(compiled.rnn, backend="eager")
    save_sparse(sparse, tmp_path / "file")
    assert_refused(tmp_path / "file", r"model holds torch.compile\(\.\.\.\) right around rnn", model, ValueError)
    assert len(model.rnn._orig_mod._forward_hooks) == 1


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (3, TypeError, "model must be an nn.Module, got int"),
        (nn.GRU(2, 3), ValueError, r"model must hold a module that to_sparse\(\) made, got a GRU with none; save"),
        (nn.Linear(2, 3), ValueError, "got a Linear with none"),
    ],
)
def test_wrong_models_are_not_saved(tmp_path, model, error, message):
    with pytest.raises(error, match=message):
        save_sparse(model, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_extra_state_is_not_saved(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"steps": 3}

    sparse = to_sparse(make_model(), storage=(2, 1))
    sparse.norm = Extra(2, 2)
    with pytest.raises(TypeError, match="tensors only, got something else at norm"):
        save_sparse(sparse, tmp_path / "file")


def test_not_a_model_and_no_file(tmp_path):
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got dict"):
        load_sparse({}, tmp_path / "file")  # type: ignore[type-var]
    assert_refused(tmp_path / "file", "No such file", error=FileNotFoundError)
    assert_refused(tmp_path, "Is a directory", error=IsADirectoryError)
