"""Files know the layers of a model by their tensors: wrappers and hooks that rename make no difference."""

import contextlib
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.optim.swa_utils import AveragedModel

from triton_sparse_rnn import PersistentGRU, load_sparse, save_sparse, sparsity_report, to_dense, to_sparse
from triton_sparse_rnn.errors import SparseFileError

X = torch.linspace(-1, 1, 5 * 2 * 4).view(5, 2, 4)


class Model(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 16))
        self.rnn = nn.LSTM(16, 3, 2)
        self.rnn_again = self.rnn
        self.head = nn.Linear(3, 2)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if "weight_ih" in name or "weight_hh" in name:
                    weight[:, 1:] = 0

    def forward(self, x):
        return self.head(self.rnn(self.encoder(x)[0])[0])


def make_model(seed=0) -> Any:
    return Model(seed)


def compiled(module) -> Any:
    return torch.compile(module, backend="eager")


def inside(name, wrapper):
    def wrap(model):
        model.set_submodule(name, wrapper(model.get_submodule(name)))
        return model

    return wrap


WRAPPERS = {
    "nothing": lambda model: model,
    "compile": compiled,
    "compile a part": inside("encoder", compiled),
    "checkpoint": checkpoint_wrapper,
    "checkpoint a part": inside("encoder", checkpoint_wrapper),
    "checkpoint a layer": inside("encoder.1", checkpoint_wrapper),
    "offload a shared layer": inside("rnn", offload_wrapper),
    "data parallel": nn.DataParallel,
    "all": lambda model: compiled(checkpoint_wrapper(nn.DataParallel(inside("encoder.1", checkpoint_wrapper)(model)))),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_and_the_model_itself_have_the_same_file(tmp_path, wrap):
    fast = to_sparse(make_model())
    with torch.no_grad():
        expected = fast(X)
    save_sparse(to_sparse(wrap(make_model())), tmp_path / "wrapped")
    save_sparse(fast, tmp_path / "plain")
    wrapped, plain = load_file(tmp_path / "wrapped"), load_file(tmp_path / "plain")
    assert wrapped.keys() == plain.keys()
    assert all(torch.equal(wrapped[name], plain[name]) for name in plain)
    for path, around in itertools.product((tmp_path / "wrapped", tmp_path / "plain"), (wrap, lambda model: model)):
        model = around(make_model(1))
        assert load_sparse(model, path) is model
        assert sum(isinstance(module, PersistentGRU) for module in model.modules()) == 1
        with torch.no_grad():
            assert torch.equal(model(X), expected)
        load_sparse(model, path)  # into a converted one


@pytest.mark.parametrize("wrapper", [checkpoint_wrapper, nn.DataParallel])
def test_a_wrapped_layer_by_itself(tmp_path, wrapper):
    layer = make_model().encoder[1]
    save_sparse(to_sparse(wrapper(layer)), tmp_path / "file")
    expected = to_sparse(layer)(X)[0]
    for fresh in (make_model(1).encoder[1], wrapper(make_model(1).encoder[1]), nn.Sequential(make_model(1).encoder[1])):
        if isinstance(fresh, nn.Sequential):
            with pytest.raises(SparseFileError, match="holds a PersistentGRU '', where the model has a Sequential"):
                load_sparse(fresh, tmp_path / "file")
        else:
            assert torch.equal(load_sparse(fresh, tmp_path / "file")(X)[0], expected)


def test_the_average_of_a_model(tmp_path):
    averaged: Any = AveragedModel(make_model())
    averaged.update_parameters(make_model())
    fast: Any = to_sparse(averaged)
    save_sparse(fast, tmp_path / "file")
    loaded: Any = load_sparse(AveragedModel(make_model(1)), tmp_path / "file")
    assert torch.equal(loaded(X), fast(X))
    assert loaded.n_averaged == 1
    with pytest.raises(SparseFileError, match="with n_averaged, which the model does not have"):
        load_sparse(make_model(1), tmp_path / "file")
    save_sparse(fast.module, tmp_path / "file")
    assert torch.equal(load_sparse(make_model(1), tmp_path / "file")(X), fast(X))


@contextlib.contextmanager
def one_process(folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="this torch is built without torch.distributed")
def test_distributed_data_parallel(tmp_path):
    fast = to_sparse(make_model())
    with one_process(tmp_path):
        trained = nn.parallel.DistributedDataParallel(make_model())
        converted: Any = to_sparse(trained)
        save_sparse(converted, tmp_path / "file")
        assert torch.equal(converted.module(X), fast(X))
        fresh = nn.parallel.DistributedDataParallel(make_model(1))
        assert torch.equal(load_sparse(fresh, tmp_path / "file")(X), fast(X))
    assert torch.equal(load_sparse(make_model(1), tmp_path / "file")(X), fast(X))


def renaming(model, there=("encoder.1.", "listener.")):
    """Let state_dict() use another name for a part, as old checkpoints of some projects ask for."""

    def rename(module, state, prefix, metadata):
        for key in [key for key in state if key.startswith(prefix + there[0])]:
            state[key.replace(*there)] = state.pop(key)

    model.register_state_dict_post_hook(rename)
    return model


def renaming_back(model):
    def rename(module, state, prefix, *args):
        for key in [key for key in state if key.startswith(f"{prefix}listener.")]:
            state[key.replace("listener.", "encoder.1.")] = state.pop(key)

    renaming(model).register_load_state_dict_pre_hook(rename)
    return model


@pytest.mark.parametrize("change", [renaming, renaming_back, lambda m: renaming(m, ("head", "decoder"))])
def test_hooks_that_rename(tmp_path, change):
    fast = to_sparse(change(make_model()))
    save_sparse(fast, tmp_path / "file")
    names = {name.partition(".")[0] for name in load_file(tmp_path / "file")}
    assert names & {"listener", "decoder"}
    loaded = load_sparse(change(make_model(1)), tmp_path / "file")
    assert torch.equal(loaded(X), fast(X))
    assert all(map(torch.equal, loaded.state_dict().values(), fast.state_dict().values()))
    with pytest.raises(SparseFileError):
        load_sparse(make_model(1), tmp_path / "file")


def replacing(model, part, change):
    def replace(module, state, prefix, metadata):
        for key in [key for key in state if key.startswith(prefix + part)]:
            change(state, key)

    model.register_state_dict_post_hook(replace)
    return model


def test_hooks_that_replace_the_tensors_of_a_layer_are_refused(tmp_path):
    def clone(state, key):
        state[key] = state[key].clone()

    def shorten(state, key):
        state[key.replace("weight", "w")] = state.pop(key)

    for change in (clone, shorten):
        fast = replacing(to_sparse(make_model()), "encoder.1", change)
        with pytest.raises(ValueError, match=r"must hold the tensors of 'encoder\.1' under names .* state_dict hook"):
            save_sparse(fast, tmp_path / "file")
    save_sparse(to_sparse(make_model()), tmp_path / "file")
    fresh = replacing(make_model(1), "encoder.1", clone)
    with pytest.raises(ValueError, match=r"must hold the weights of 'encoder\.1' themselves, .* remove it to load"):
        load_sparse(fresh, tmp_path / "file")
    assert type(fresh.encoder[1]) is nn.GRU


def test_tensors_that_cannot_be_loaded_are_said_and_nothing_is_loaded(tmp_path):
    def rename_and_clone(state, key):
        state[f"other_{key}"] = state.pop(key).clone()

    def change(model):
        return replacing(model, "head", rename_and_clone)

    save_sparse(change(to_sparse(make_model())), tmp_path / "file")
    fresh = change(make_model(1))
    before = [tensor.clone() for tensor in fresh.parameters()]
    with pytest.raises(ValueError, match=r"must take what .* gives, but not so other_head\.weight, other_head\.bias"):
        load_sparse(fresh, tmp_path / "file")
    assert type(fresh.encoder[1]) is nn.GRU
    assert all(map(torch.equal, fresh.parameters(), before))


def test_names_that_wrappers_use_too(tmp_path):
    class Same(nn.Module):
        def __init__(self, seed=0):
            super().__init__()
            self.module = make_model(seed).encoder[1]
            self.weight_hh_l0 = nn.Parameter(torch.full((2,), float(seed)))
            self.head = nn.Linear(2, 2)

    model = Same()
    fast: Any = to_sparse(model)
    save_sparse(fast, tmp_path / "file")
    loaded: Any = load_sparse(Same(1), tmp_path / "file")
    assert torch.equal(loaded.module(X)[0], fast.module(X)[0])
    assert torch.equal(loaded.weight_hh_l0, model.weight_hh_l0)


@pytest.mark.filterwarnings("ignore:.*little to skip")
def test_two_layers_with_the_same_weights_keep_their_places(tmp_path):
    def build(seed=0):
        model: Any = nn.ModuleList([nn.RNN(4, 4), nn.RNN(4, 4, nonlinearity="relu")])
        for name, weight in make_model(seed).encoder[1].named_parameters():
            setattr(model[0], name, nn.Parameter(weight.detach()[:4, :4] if weight.dim() > 1 else weight.detach()[:4]))
            setattr(model[1], name, getattr(model[0], name))
        model[0].weight_hh_l0 = model[1].weight_hh_l0 = nn.Parameter(torch.eye(4))
        return model

    fast: Any = to_sparse(build())
    save_sparse(fast, tmp_path / "file")
    loaded: Any = load_sparse(build(1), tmp_path / "file")
    for ours, theirs in zip(loaded, fast, strict=True):
        assert torch.equal(ours(X)[0], theirs(X)[0])


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("cell", [nn.GRU, nn.LSTM])
def test_sizes_that_are_numbers_of_numpy(tmp_path, cell):
    def build():
        sizes = {"num_layers": np.int64(2), "bias": True, "dropout": np.float32(0.25), "bidirectional": True}
        sizes |= {"proj_size": np.int64(3)} if cell is nn.LSTM else {}
        layer = cell(4, 6, batch_first=True, **sizes)
        with torch.no_grad():
            for name, weight in layer.named_parameters():
                if "weight_ih" in name or "weight_hh" in name:
                    weight[:, 1:] = 0
        return layer

    layer = build().eval()
    options: dict[str, Any] = {"num_threads": np.int64(1), "storage": (np.int64(2), np.int32(1))}
    fast: Any = to_sparse(layer, **options)
    torch.testing.assert_close(fast(X)[0], layer(X)[0])
    save_sparse(fast, tmp_path / "file")
    assert torch.equal(load_sparse(build(), tmp_path / "file")(X)[0], fast(X)[0])
    assert all(map(torch.equal, to_dense(fast).parameters(), layer.parameters()))
    assert type(fast.num_threads) is type(fast.num_layers) is type(fast.proj_size) is int
    assert sparsity_report(fast).density < 1
