import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from triton_sparse_rnn.gate_gradients.options import GateGradientSparsity
from triton_sparse_rnn.nn import PersistentGRU, SparseGRU, SparseLSTM
from triton_sparse_rnn.nn.instance_state import (
    HOOKS,
    added_state,
    become,
    colliding_names,
    overriding_attributes,
    take_over,
    what_is_lost,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*little to skip")


def make_layer(cell: Any = nn.GRU) -> Any:
    layer = cell(3, 4)
    layer.label = ["a", "b"]
    layer.gain = nn.Parameter(torch.ones(2))
    layer.register_parameter("absent", None)
    layer.register_buffer("count", torch.tensor(3))
    layer.register_buffer("scratch", torch.zeros(2), persistent=False)
    layer.norm = nn.LayerNorm(4)
    return layer


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.RNN(3, 4),
        lambda: nn.GRU(3, 4, 2, bidirectional=True),
        lambda: nn.LSTM(3, 4, proj_size=2, bias=False),
        lambda: SparseGRU(3, 4),
        lambda: SparseLSTM(3, 4, gate_gradient=GateGradientSparsity(target=0.5)),
        lambda: PersistentGRU.from_dense(nn.GRU(3, 4)),
        lambda: PersistentGRU.from_dense(nn.GRU(3, 4), weight_dtype=torch.int8),
    ],
)
def test_nothing_was_added_to_a_new_layer(make):
    layer = make()
    *added, hooks = added_state(layer)
    assert not any(added)
    assert not any(hooks.values())
    assert added_state(copy.deepcopy(layer)).holdings() == {}
    assert overriding_attributes(layer) == []


@pytest.mark.parametrize("cell", [nn.GRU, SparseGRU, lambda *sizes: PersistentGRU.from_dense(nn.GRU(*sizes))])
def test_what_was_added(cell):
    layer = make_layer(cell)
    attributes, parameters, buffers, modules, _ = added_state(layer)
    assert attributes == {"label": ["a", "b"]}
    assert parameters == {"gain": layer.gain, "absent": None}
    assert buffers == {"count": layer.count, "scratch": layer.scratch}
    assert modules == {"norm": layer.norm}


def test_weights_of_weight_norm_and_parametrizations_are_not_added_modules():
    layer = nn.utils.parametrizations.weight_norm(nn.GRU(3, 4), "weight_hh_l0")
    assert added_state(layer).modules == {}


def test_every_kind_of_hook_is_taken_over():
    old, new, calls = nn.GRU(3, 4), SparseGRU(3, 4), []
    register = [
        old.register_forward_hook,
        old.register_forward_pre_hook,
        old.register_full_backward_hook,
        old.register_full_backward_pre_hook,
        old.register_state_dict_post_hook,
        old.register_state_dict_pre_hook,
        old.register_load_state_dict_pre_hook,
        old.register_load_state_dict_post_hook,
    ]
    for one in register:
        one(lambda *args, name=one.__name__: calls.append(name))
    old.register_forward_hook(lambda *args: calls.append("always"), with_kwargs=True, always_call=True)
    old.register_forward_pre_hook(lambda *args: calls.append("keywords"), with_kwargs=True)
    take_over(new, old, lambda value: copy.deepcopy(value, {id(old): new}))
    assert all(getattr(old, kind).keys() == getattr(new, kind).keys() for kind in HOOKS)
    assert all(getattr(old, kind) is not getattr(new, kind) for kind in HOOKS)
    for layer in (old, new):
        calls.clear()
        layer.load_state_dict(layer.state_dict())
        layer(torch.ones(2, 1, 3, requires_grad=True))[0].sum().backward()
        assert {*calls} == {one.__name__ for one in register} | {"always", "keywords"}


def test_a_replacement_keeps_hooks_of_its_own():
    old, new, calls = nn.GRU(3, 4), SparseGRU(3, 4), []
    old.register_forward_hook(lambda *args: calls.append("old"))
    new.register_forward_hook(lambda *args: calls.append("new"))
    take_over(new, old, lambda value: copy.deepcopy(value, {id(old): new}))
    new(torch.ones(2, 1, 3))
    assert sorted(calls) == ["new", "old"]


def test_attributes_that_stand_before_those_of_the_class():
    layer: Any = nn.GRU(3, 4)
    layer._old_forward, layer._hf_hook = layer.forward, object()
    layer.forward = lambda *args: layer._old_forward(*args)
    layer.extra_repr = lambda: ""
    layer.dump_patches = True
    assert overriding_attributes(layer) == ["dump_patches", "extra_repr", "forward"]
    lost, way_out = what_is_lost(layer, PersistentGRU)
    assert lost.startswith("a GRU, which has its own dump_patches, extra_repr, forward set on the layer itself")
    assert way_out.startswith("accelerate.hooks.remove_hook_from_module(model, recurse=True)")
    layer.forward = layer._old_forward  # as accelerate leaves a layer
    del layer._old_forward, layer._hf_hook, layer.extra_repr, layer.dump_patches
    assert what_is_lost(layer, PersistentGRU) == ("", "")
    layer.__class__ = SparseGRU
    assert overriding_attributes(layer) == []
    layer.forward = nn.GRU(3, 4).forward  # of another layer
    assert overriding_attributes(layer) == ["forward"]


def test_a_compiled_layer_loses_nothing():
    layer = nn.GRU(3, 4)
    layer.compile(backend="eager")
    assert what_is_lost(layer, PersistentGRU) == ("", "")


@pytest.mark.parametrize(
    "name", ["backend", "step", "density", "_plan", "_marker", "weight_hh_l0_values", "weight_ih_l0_scales"]
)
@pytest.mark.parametrize("kind", ["attribute", "buffer", "parameter", "module"])
def test_names_that_the_new_class_uses(name, kind):
    layer: Any = nn.GRU(3, 4)
    value = {"attribute": 3, "parameter": nn.Parameter(torch.ones(1)), "module": nn.ReLU()}
    layer.register_buffer(name, torch.ones(1)) if kind == "buffer" else setattr(layer, name, value[kind])
    assert colliding_names(layer, PersistentGRU) == [name]
    lost, _ = what_is_lost(layer, PersistentGRU)
    assert lost == f"a GRU, to which {name} was added, a name that PersistentGRU uses itself"


def test_names_that_the_dense_class_uses():
    layer: Any = PersistentGRU.from_dense(nn.GRU(3, 4))
    layer.all_weights = []
    assert colliding_names(layer, nn.GRU) == ["all_weights"]


def test_a_layer_becomes_another_and_is_restored():
    layer = make_layer()
    calls, before = [], dict(vars(layer))
    handle = layer.register_forward_hook(lambda *args: calls.append(args))
    new = PersistentGRU.from_dense(nn.GRU(3, 4))
    x = torch.ones(2, 1, 3)
    expected, dense = new(x)[0], layer(x)[0]
    undo = become(layer, new)
    assert type(layer) is PersistentGRU
    assert torch.equal(layer(x)[0], expected)
    assert (layer.label, layer.gain, layer.norm) == (before["label"], before["_parameters"]["gain"], layer.norm)
    assert {"count", "gain", "norm.weight"} <= layer.state_dict().keys()
    assert not {"scratch", "_marker"} & layer.state_dict().keys()
    handle.remove()
    layer(x)
    assert len(calls) == 2
    undo()
    assert type(layer) is nn.GRU
    assert torch.equal(layer(x)[0], dense)


def test_a_flatten_parameters_that_does_nothing_is_no_hindrance():
    layer: Any = nn.GRU(3, 16)
    layer.flatten_parameters = lambda: None
    assert what_is_lost(layer, PersistentGRU) == what_is_lost(layer, SparseGRU) == ("", "")


def test_a_parametrized_parameter_of_the_users_would_be_lost():
    layer: Any = nn.GRU(3, 16)
    layer.register_parameter("scale", nn.Parameter(torch.ones(1)))
    parametrize.register_parametrization(layer, "scale", nn.Identity())
    lost, way_out = what_is_lost(layer, PersistentGRU)
    assert "would lose scale" in lost
    assert "remove_parametrizations" in way_out
