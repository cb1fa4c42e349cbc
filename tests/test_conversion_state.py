"""What a model holds on its instances, not in its classes: taken over by a conversion, or refused by name."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from triton_sparse_rnn import (
    OneShot,
    PersistentGRU,
    Pruner,
    SparseGRU,
    load_sparse,
    save_sparse,
    sparsify,
    to_dense,
    to_sparse,
)
from triton_sparse_rnn.gate_gradients.options import GateGradientSparsity

X = torch.linspace(-1, 1, 5 * 2 * 4).view(5, 2, 4)


def make_layer(seed=0, cell: Any = nn.GRU, inputs=4) -> Any:
    torch.manual_seed(seed)
    layer = cell(inputs, 16)
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if name.startswith("weight"):
                weight[:, 1:] = 0
    return layer


class Model(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.rnn = make_layer(seed)
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def make_model(seed=0) -> Any:
    return Model(seed)


def tripled(layer):
    original = layer.forward
    layer.forward = lambda x, hx=None: original(3 * x, hx)


def hooked(layer):
    """As accelerate's add_hook_to_module leaves a layer."""
    layer._hf_hook, layer._old_forward = object(), layer.forward
    layer.forward = lambda *args, **kwargs: layer._old_forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("change", "way_out"), [(tripled, "take forward away first"), (hooked, "accelerate.hooks.remove_hook_from_module")]
)
def test_a_forward_of_the_instance_leaves_the_layer_dense(tmp_path, change, way_out):
    model: Any = nn.Sequential(make_layer(), nn.Identity())
    change(model[0])
    message = f"'0' is a GRU, which has its own forward set on the layer itself and would lose it; {way_out}"
    with pytest.raises(ValueError, match=f"got a Sequential with {message}"):
        to_sparse(model)
    for convert in (PersistentGRU.from_dense, SparseGRU.from_dense):
        with pytest.raises((ValueError, TypeError), match="own forward set on the layer itself"):
            convert(model[0])
    model[1] = make_layer()
    with (
        pytest.warns(UserWarning, match=f"to_sparse left some layers dense: {message}"),
        pytest.warns(
            UserWarning, match=r"functions are not copied, .* the copy will follow: model.0.forward \(model.0\)"
        ),
    ):
        fast: Any = to_sparse(model)
    assert [type(module) for module in fast] == [nn.GRU, PersistentGRU]
    save_sparse(to_sparse(nn.Sequential(make_layer())), tmp_path / "file")
    fresh = nn.Sequential(make_layer(1))
    change(fresh[0])
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(ValueError, match=f"model has '0', a GRU, which has its own forward .*; {way_out}"):
        load_sparse(fresh, tmp_path / "file")
    assert type(fresh[0]) is nn.GRU
    assert all(map(torch.equal, fresh.state_dict().values(), before.values()))


def test_a_class_of_its_own_is_not_loaded_into(tmp_path):
    class Tripled(nn.GRU):
        def forward(self, input, hx=None):
            return super().forward(3 * input, hx)

    save_sparse(to_sparse(make_layer()), tmp_path / "file")
    with pytest.raises(ValueError, match="model has '', a Tripled, which would lose forward; derive a class from"):
        load_sparse(Tripled(4, 16), tmp_path / "file")


def test_a_forward_of_a_converted_layer_is_not_lost(tmp_path):
    fast: Any = to_sparse(nn.Sequential(make_layer()))
    save_sparse(fast, tmp_path / "file")
    expected = fast[0](3 * X)[0]
    tripled(fast[0])
    for convert in (lambda: to_dense(fast), lambda: fast[0].to_dense()):
        with pytest.raises(ValueError, match="PersistentGRU, which has its own forward set on the layer itself"):
            convert()
    assert torch.equal(load_sparse(fast, tmp_path / "file")[0](X)[0], expected)


def test_a_bound_forward_is_the_same_forward():
    model = make_model()
    for module in (model, model.rnn):
        module.forward = module.forward  # as accelerate leaves a module
    expected = model(X)
    fast: Any = to_sparse(model)
    assert fast.forward.__self__ is fast
    assert type(fast.rnn) is PersistentGRU
    torch.testing.assert_close(fast(X), expected)
    assert "forward" not in vars(fast.rnn)


def add_everything(layer, seed=0):
    torch.manual_seed(seed)
    layer.label = {"name": ["encoder"]}
    layer.gain = nn.Parameter(torch.rand(16))
    layer.register_buffer("shift", torch.rand(16))
    layer.register_buffer("half_shift", torch.rand(16).half())
    layer.register_buffer("calls", torch.tensor(0))
    layer.register_buffer("scratch", torch.rand(16), persistent=False)
    layer.norm = nn.LayerNorm(16)
    nn.init.normal_(layer.norm.weight)
    layer.inner = make_layer(seed, inputs=16)

    def use(module, args, result):
        module.calls += 1
        y = module.norm(result[0]) * module.gain + module.shift + module.half_shift + module.scratch
        return module.inner(y)[0] * len(module.label), result[1]

    layer.register_forward_hook(use)


def test_what_was_added_to_a_layer_comes_along_there_and_back(tmp_path):
    model = make_model()
    add_everything(model.rnn)
    model.head.weight = nn.Parameter(model.head.weight.detach() * 2)
    model.tied = model.rnn.gain
    expected = model(X).detach()
    fast: Any = to_sparse(model)
    torch.testing.assert_close(fast(X).detach(), expected)
    assert type(fast.rnn.inner) is PersistentGRU
    assert fast.tied is fast.rnn.gain is not model.rnn.gain
    assert fast.rnn.label == model.rnn.label
    assert fast.rnn.label["name"] is not model.rnn.label["name"]
    assert {"rnn.gain", "rnn.shift", "rnn.norm.weight", "rnn.calls"} <= fast.state_dict().keys()
    assert "rnn.scratch" not in fast.state_dict()
    assert (model.rnn.calls.item(), fast.rnn.calls.item()) == (1, 2)
    back: Any = to_dense(fast)
    assert list(back.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(back(X).detach(), expected, rtol=0, atol=0)
    fast.rnn.calls.zero_()
    save_sparse(fast, tmp_path / "file")
    fresh = make_model(1)
    add_everything(fresh.rnn, 1)
    fresh.tied = fresh.rnn.gain
    fresh.rnn.scratch.copy_(model.rnn.scratch)
    load_sparse(fresh, tmp_path / "file")
    assert type(fresh.rnn) is type(fresh.rnn.inner) is PersistentGRU
    assert torch.equal(fresh(X), fast(X))
    assert "rnn.scratch" not in fresh.state_dict()
    half = copy.deepcopy(fast.rnn).half()
    assert half.shift.dtype is half.weight_hh_l0_values.dtype is torch.float16
    double = copy.deepcopy(fast.rnn).double()
    assert double.half_shift.dtype is torch.float64  # as in any module
    assert double.calls.dtype is torch.int64


def test_added_values_of_a_file_of_another_kind_are_refused(tmp_path):
    model = make_model()
    model.rnn.register_buffer("shift", torch.zeros(2))
    save_sparse(to_sparse(model), tmp_path / "file")
    with pytest.raises(ValueError, match=r"with rnn.shift, which the model does not have"):
        load_sparse(make_model(), tmp_path / "file")


def test_a_layer_converted_by_itself_takes_the_same_along():
    layer = make_layer(cell=SparseGRU)
    add_everything(layer)
    for fast in (to_sparse(layer), layer.to_sparse(), PersistentGRU.from_dense(layer)):
        torch.testing.assert_close(fast(X)[0], layer(X)[0])
        assert torch.equal(to_dense(fast)(X)[0], layer(X)[0])


def test_names_that_the_converted_layer_uses_are_refused():
    model: Any = nn.Sequential(make_layer(), make_layer())
    model[0].backend = "mine"
    with pytest.warns(UserWarning, match="'0' is a GRU, to which backend was added, a name that PersistentGRU uses"):
        assert type(to_sparse(model)[0]) is nn.GRU
    with pytest.raises(ValueError, match="the layer cannot be converted: it is a GRU, to which backend was added"):
        PersistentGRU.from_dense(model[0])


def test_a_forward_that_holds_the_model_is_refused_and_the_layer_is_not():
    model = make_model()
    model.forward = torch.no_grad()(model.forward)
    message = "model.forward holds a function 'Model.forward', which refers to the model itself by its variable 'func'"
    with pytest.raises(TypeError, match=message):
        to_sparse(model)
    expected = model(X)
    model.rnn = to_sparse(model.rnn)
    torch.testing.assert_close(model(X), expected)
    with pytest.raises(TypeError, match=message):
        to_dense(model)
    model.rnn = to_dense(model.rnn)
    assert torch.equal(model(X), expected)


def test_the_best_model_so_far_does_not_change():
    model = make_model().train()
    model.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(X).sum().backward()
    best: Any = to_sparse(model)
    dense: Any = to_dense(best)
    expected, as_before = best(X).detach(), copy.deepcopy(dense.state_dict())
    model.optimizer.step()
    assert torch.equal(best(X).detach(), expected)
    assert all(map(torch.equal, dense.state_dict().values(), as_before.values()))
    assert all(p.requires_grad and p.grad is None for p in best.parameters())
    assert best.optimizer.param_groups[0]["params"][-1] is best.head.bias
    best.head.weight.detach().zero_()
    assert torch.equal(dense.head.weight, as_before["head.weight"])
    assert model.head.weight.abs().sum() > 0


def test_what_inference_mode_left_is_copied():
    model = make_model()
    with torch.inference_mode():
        model.last = model(X)
    assert torch.equal(to_sparse(model).last, model.last)


def test_loading_reaches_whatever_refers_to_the_layer(tmp_path):
    save_sparse(to_sparse(make_model()), tmp_path / "file")
    model, calls = make_model(1), []
    model.by_hand = [model.rnn]
    model.run = lambda x, rnn=model.rnn: rnn(x)
    model.forward = torch.no_grad()(model.forward)
    handle = model.rnn.register_forward_hook(lambda *args: calls.append(args))
    layer = model.rnn
    assert load_sparse(model, tmp_path / "file") is model
    assert layer is model.rnn is model.by_hand[0]
    assert torch.equal(model.run(X)[0], to_sparse(make_model()).rnn(X)[0])
    handle.remove()
    model(X)
    assert len(calls) == 1


def test_loading_into_a_model_that_was_compiled_and_has_run(tmp_path):
    save_sparse(to_sparse(make_model()), tmp_path / "file")
    model: Any = torch.compile(make_model(1), backend="eager")
    with torch.no_grad():
        model(X)
        load_sparse(model, tmp_path / "file")
        assert torch.equal(model(X), model._orig_mod(X))
    fresh = make_model(1)
    fresh.rnn.compile(backend="eager")
    with pytest.raises(ValueError, match=r"torch.compile\(...\) right around rnn; load first, then compile"):
        load_sparse(fresh, tmp_path / "file")


def test_sparsify_does_not_give_a_gate_gradient_to_a_layer_that_would_pass_it_by():
    model: Any = nn.Sequential(make_layer(), make_layer())
    tripled(model[0])
    with pytest.warns(UserWarning, match="'0' is a GRU, whose own forward, set on the layer itself, would pass it by"):
        sparsify(model, gate_gradient=GateGradientSparsity(target=0.5))
    assert [type(layer) for layer in model] == [nn.GRU, SparseGRU]
    expected = model[0](X)[0]
    sparsify(model)  # changes only the class
    assert torch.equal(model[0](X)[0], expected)


def test_from_dense_of_a_training_module_takes_along_what_was_added():
    layer = make_layer()
    add_everything(layer)
    new = SparseGRU.from_dense(layer)
    assert torch.equal(new(X)[0], layer(X)[0])
    assert new.gain is layer.gain
    assert new.shift is layer.shift
    assert new.norm is layer.norm
    assert list(new.state_dict()) == list(layer.state_dict())


def test_weights_that_are_converted_are_never_copied_dense(monkeypatch):
    copied, copy_parameter = [], nn.Parameter.__deepcopy__

    def copy_and_tell(parameter, memo):
        copied.append(parameter)
        return copy_parameter(parameter, memo)

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", copy_and_tell)
    model = make_model()
    to_sparse(model)
    assert [id(parameter) for parameter in copied] == [id(model.head.weight), id(model.head.bias)]


def test_what_refuses_to_be_copied_says_why_itself():
    model = make_model()
    model.pruner = Pruner(model, OneShot(sparsity=0.5, step=1), pattern=(16, 1))  # refers to the model weakly, too
    with pytest.raises(TypeError, match=r"model\.pruner holds a Pruner \(a Pruner cannot be copied or pickled"):
        to_sparse(model)
