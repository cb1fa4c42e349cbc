import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from triton_sparse_rnn import BackendUnavailableError, SparseGRU, load_sparse, save_sparse, to_dense, to_sparse
from triton_sparse_rnn.errors import SparseFileError
from triton_sparse_rnn.nn.persistent import PersistentLayer
from triton_sparse_rnn.sparse import files


class Model(nn.Module):
    """Every kind of tensor a model may hold: tied, shared, integer, bool, 0-D, empty; and layers in several places."""

    def __init__(self, cell: Any = nn.GRU, hidden_size=6, layers=2, dtype=torch.float32, **options):
        super().__init__()
        self.embedding = nn.Embedding(9, 4, dtype=dtype)
        self.rnn = cell(4, hidden_size, layers, dtype=dtype, **options)
        self.stack = nn.ModuleList([nn.LSTM(hidden_size, 4, proj_size=3, dtype=dtype), nn.Identity()])
        self.rnn_again = self.rnn
        self.head = nn.Linear(4, 9, bias=False, dtype=dtype)
        self.head.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("empty", torch.empty(0, 2))
        self.register_buffer("narrow", torch.ones(2, dtype=torch.bfloat16))

    def forward(self, tokens):
        return self.stack[0](self.rnn(self.embedding(tokens))[0])[0]  # type: ignore[operator]


def make_model(seed=0, **options) -> Any:
    torch.manual_seed(seed)
    model = Model(**options).eval().requires_grad_(False)
    for layer in (model.rnn, model.stack[0]):
        for name, weight in layer.named_parameters():  # type: ignore[union-attr]
            if name.startswith(("weight_ih", "weight_hh")):
                weight[:, 1:] = 0
    return model


def prepare(path: Path, model: Any = None, **options) -> Any:
    sparse = to_sparse(make_model() if model is None else model, storage=(2, 1), **options)
    save_sparse(sparse, path)
    return sparse


def snapshot(model):
    modules = list(model.modules())
    tensors = [(tensor, tensor.detach().clone()) for tensor in model.state_dict(keep_vars=True).values()]
    return modules, tensors


def assert_untouched(model, before):
    modules, tensors = before
    assert [id(module) for module in model.modules()] == [id(module) for module in modules]
    for tensor, (same, value) in zip(model.state_dict(keep_vars=True).values(), tensors, strict=True):
        assert tensor is same
        assert torch.equal(tensor, value)


def assert_refused(path, message, model=None, error: type[Exception] = SparseFileError):
    model = make_model(seed=1) if model is None else model
    before = snapshot(model)
    with pytest.raises(error, match=message):
        load_sparse(model, path)
    assert_untouched(model, before)


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


def test_hooks_of_the_fresh_model_are_kept(tmp_path):
    prepare(tmp_path / "file")
    model, seen = make_model(1), []
    model.rnn.register_forward_hook(lambda module, args, result: seen.append(type(module).__name__))
    load_sparse(model, tmp_path / "file")(TOKENS)
    assert seen == ["PersistentGRU"]


def test_unconverted_subclasses_stay(tmp_path):
    class Stateful(nn.GRU):
        def reset(self): ...

    model = make_model(cell=Stateful)
    with pytest.warns(UserWarning, match="left some layers dense"):
        prepare(tmp_path / "file", model)
    loaded: Any = load_sparse(make_model(1, cell=Stateful), tmp_path / "file")
    assert type(loaded.rnn) is Stateful
    assert torch.equal(loaded.rnn.state_dict()["weight_hh_l0"], model.rnn.weight_hh_l0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 7}, "holds 'rnn' with hidden_size=6, the model's has 7"),
        ({"layers": 1}, "holds 'rnn' with num_layers=2, the model's has 1"),
        ({"bias": False}, "holds 'rnn' with bias=True, the model's has False"),
        ({"bidirectional": True}, "holds 'rnn' with bidirectional=False, the model's has True"),
        ({"cell": nn.LSTM}, "holds a PersistentGRU 'rnn', where the model has a LSTM; build the model with nn.GRU"),
        ({"cell": nn.RNN}, "where the model has a RNN"),
        ({"dtype": torch.float64}, r"'rnn' in float32, the model's is in float64; .* .to\(torch.float32\)"),
    ],
)
def test_another_architecture_is_refused(tmp_path, options, message):
    prepare(tmp_path / "file")
    assert_refused(tmp_path / "file", message, make_model(1, **options))


def test_another_nonlinearity_is_refused(tmp_path):
    prepare(tmp_path / "file", make_model(cell=nn.RNN, nonlinearity="relu"))
    assert_refused(tmp_path / "file", "with mode=RNN_RELU, the model's has RNN_TANH", make_model(1, cell=nn.RNN))


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
    gru: Any = nn.GRU(4, 6).requires_grad_(False)
    for weight in (gru.weight_ih_l0, gru.weight_hh_l0):
        weight[:, 1:] = 0
    for name, weight_dtype in (("float", None), ("double", torch.float64)):
        save_sparse(to_sparse(gru, storage=(2, 1), weight_dtype=weight_dtype), tmp_path / name)
    model = to_sparse(gru, storage=(2, 1), backend="cpu")
    assert load_sparse(model, tmp_path / "float").backend == "cpu"
    assert_refused(tmp_path / "double", "backend 'cpu' cannot run this layer", model, BackendUnavailableError)


def make_gru(seed=0, zeroed=("weight_ih_l0", "weight_hh_l0")) -> Any:
    torch.manual_seed(seed)
    gru = nn.GRU(4, 6).requires_grad_(False)
    for name in zeroed:
        getattr(gru, name)[:, 1:] = 0
    return gru


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


@pytest.mark.parametrize("damage", [lambda c: c[:-1], lambda c: c + b"\0", lambda c: b"", lambda c: c[: len(c) // 2]])
def test_a_damaged_file_leaves_the_model_alone(tmp_path, damage):
    prepare(tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(damage(content))
    assert_refused(tmp_path / "file", "nothing was loaded")


def test_every_damaged_tensor_is_found(tmp_path):
    path = tmp_path / "file"
    prepare(path)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    model = make_model(1)
    before = snapshot(model)
    for name, tensor in header.items():
        if name != "__metadata__" and tensor["data_offsets"][0] < tensor["data_offsets"][1]:
            damaged = bytearray(content)
            damaged[start + tensor["data_offsets"][1] - 1] ^= 64
            path.write_bytes(damaged)
            with pytest.raises(SparseFileError, match="is damaged"):
                load_sparse(model, path)
    assert_untouched(model, before)


def test_a_foreign_safetensors_file(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "file")
    assert_refused(tmp_path / "file", r"was not written by save_sparse\(\)")
    torch.save(make_model().state_dict(), tmp_path / "file")
    assert_refused(tmp_path / "file", "is not a safetensors file")


def forge(path, change_tensors, change_content=lambda content: None):
    """Rewrite a file with other tensors and description, and a digest that fits."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    description = json.loads(metadata["description"])
    change_tensors(tensors)
    change_content(description["content"]["modules"])
    metadata["description"] = json.dumps(description)
    metadata["sha256"] = files._digest(tensors, metadata["description"])
    save_file(tensors, path, metadata=metadata)


NAME = "rnn.weight_hh_l1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({f"{NAME}_starts": t[f"{NAME}_starts"] + 1}), "starts must rise from 0"),
        (lambda t: t.update({f"{NAME}_starts": t[f"{NAME}_starts"] * 1000}), "starts must rise from 0"),
        (lambda t: t.update({f"{NAME}_starts": t[f"{NAME}_starts"][:-1].clone()}), "do not fit together"),
        (lambda t: t.update({f"{NAME}_starts": t[f"{NAME}_starts"].long()}), "starts must be torch.int32"),
        (lambda t: t.update({f"{NAME}_columns": t[f"{NAME}_columns"] + 6}), "columns must lie in 0..5"),
        (lambda t: t.update({f"{NAME}_columns": t[f"{NAME}_columns"] - 1}), "columns must lie in 0..5"),
        (lambda t: t.update({f"{NAME}_values": t[f"{NAME}_values"][:-1].clone()}), "do not fit together"),
        (lambda t: t.update({f"{NAME}_values": t[f"{NAME}_values"][0].clone()}), "do not fit together"),
        (lambda t: t.update({f"{NAME}_values": t[f"{NAME}_values"].int()}), "values must be one of"),
        (lambda t: t.update({f"{NAME}_values": t[f"{NAME}_values"].to(torch.int8)}), "scales are needed beside"),
        (lambda t: t.update({f"{NAME}_scales": torch.ones(18)}), "scales must be None beside"),
        (lambda t: t.pop(f"{NAME}_values"), "describes its tensors wrongly .*_values"),
        (lambda t: t.pop("rnn.bias_ih_l0"), "describes its tensors wrongly .*bias_ih_l0"),
        (lambda t: t.update({"rnn.bias_ih_l0": torch.zeros(17)}), r"bias_ih_l0 is torch.float32 of shape \(17,\)"),
        (lambda t: t.update({"rnn.bias_ih_l0": torch.zeros(18).double()}), "bias_ih_l0 is torch.float64"),
        (lambda t: t.update({"stack.0.weight_hr_l0": torch.zeros(3, 4)}), "weight_hr_l0 must be a BlockMatrix"),
        (
            lambda t: t.update({"rnn.weight_ih_l0": torch.zeros(18, 4)}),
            "with rnn.weight_ih_l0_columns, .*, which the mo",
        ),
        (lambda t: t.update({"rnn.more": torch.zeros(1)}), "with rnn.more, which the model does not have"),
    ],
)
def test_forged_tensors_are_refused(tmp_path, change, message):
    prepare(tmp_path / "file")
    forge(tmp_path / "file", change)
    assert_refused(tmp_path / "file", message)


@pytest.mark.parametrize("block_size", [(10**9, 1), (1, 10**9), (4097, 1)])
@pytest.mark.parametrize("backend", [None, "cpu"])
def test_blocks_larger_than_their_matrix_and_none_stored_are_refused(tmp_path, block_size, backend):
    """A file of 3 KB, of which the first call took gigabytes."""
    BR, BC = block_size
    save_sparse(to_sparse(make_gru(), storage=(2, 1)), tmp_path / "file")

    def enlarge(tensors):
        tensors["weight_hh_l0_values"] = torch.empty(0, BC, BR)
        tensors["weight_hh_l0_columns"] = torch.empty(0, dtype=torch.int32)
        tensors["weight_hh_l0_starts"] = torch.zeros(4, dtype=torch.int32)

    forge(tmp_path / "file", enlarge)
    model = make_gru(1) if backend is None else to_sparse(make_gru(1), storage=(2, 1), backend=backend)
    assert_refused(tmp_path / "file", r"blocks must be at most \(4096, 4096\) for a matrix of 6 x 6, got", model)


def test_a_recurrent_weight_that_is_not_in_blocks_is_refused(tmp_path):
    prepare(tmp_path / "file")
    forge(tmp_path / "file", lambda tensors: tensors.update({NAME: torch.zeros(18, 6)}))
    assert_refused(tmp_path / "file", "weight_hh_l1 must be a BlockMatrix")


@pytest.mark.parametrize(
    "change",
    [
        lambda modules: modules["rnn"].pop("class"),
        lambda modules: modules["rnn"].update({"class": "Linear"}),
        lambda modules: modules["rnn"].update(config=3),
        lambda modules: modules["rnn"].pop("dtype"),
        lambda modules: modules["rnn"].update(dtype="load"),
        lambda modules: modules["rnn"]["config"].update(width=3),
        lambda modules: modules["rnn"]["config"].update(weight_ih_l0=3),
        lambda modules: modules["rnn"]["config"].update(weight_ih_l0=[[1.0]]),
        lambda modules: modules["rnn"]["config"].update(forward=3),
        lambda modules: modules["rnn"]["config"].update(__class__="x"),
        lambda modules: modules["rnn"]["config"].pop("mode"),
        lambda modules: modules["rnn"]["config"].update(bias=None),
        lambda modules: modules["rnn"]["config"].update(hidden_size="6"),
        lambda modules: modules["rnn"]["config"].update(hidden_size=[6]),
        lambda modules: modules["rnn"]["config"].update(hidden_size=10**12),
        lambda modules: modules["rnn"]["config"].update(batch_first=False),
        lambda modules: modules["rnn"].pop("config"),
        lambda modules: modules["rnn"].pop("activation_dtype"),
        lambda modules: modules["rnn"].update(activation_dtype="int8"),  # its weights are not
        lambda modules: modules["rnn"].update(activation_dtype="float16"),
        lambda modules: modules["rnn"].update(activation_dtype=[]),
        lambda modules: modules.update(rnn=None),
        lambda modules: modules.pop("rnn"),
    ],
)
def test_a_forged_description_is_refused(tmp_path, change):
    prepare(tmp_path / "file")
    forge(tmp_path / "file", lambda tensors: None, change)
    assert_refused(tmp_path / "file", "describes its tensors wrongly|holds")
