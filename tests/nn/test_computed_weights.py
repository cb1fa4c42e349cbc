"""Weights under torch's norms, pruning and parametrizations: converted and reported, or refused."""

import copy
import warnings
from typing import Any

import pytest
import torch
from persistent_cases import CELLS, assert_same_bits, make_pruned
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_spectral_norm, remove_weight_norm, spectral_norm

from triton_sparse_rnn import PersistentGRU, sparsify, sparsity_report, to_dense, to_sparse
from triton_sparse_rnn.nn.computed_weights import computed_weight, join_parts, read_weight

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*little to skip"),  # of weights that a norm has filled
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),  # of nn.LSTM
]
NAMES = ["weight_hh_l0", "weight_ih_l1_reverse"]
OPTIONS: dict[Any, dict[str, Any]] = {nn.RNN: {}, nn.GRU: {}, nn.LSTM: {"proj_size": 3}}


def weight_norm(layer: nn.Module, name: str, dim: Any = 0) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and in use
        return nn.utils.weight_norm(layer, name, dim)


def other_weight_norm(layer: nn.Module, name: str) -> nn.Module:
    return parametrizations.weight_norm(layer, name)


HOOKS: dict[str, Any] = {
    "prune": lambda layer, name: prune.l1_unstructured(layer, name, 0.9),
    "weight norm": weight_norm,
    "spectral norm": spectral_norm,
}
PARAMETRIZATIONS: dict[str, Any] = {
    "identity": lambda layer, name: parametrize.register_parametrization(layer, name, nn.Identity()),
    "weight norm": other_weight_norm,
    "spectral norm": parametrizations.spectral_norm,
}
REMOVALS: dict[str, Any] = {
    "prune": prune.remove,
    "weight norm": remove_weight_norm,
    "spectral norm": remove_spectral_norm,
}


def build(cell, compute, **options) -> Any:
    """A model whose layer computes two of its weights; the other ones have zeros."""
    everything = {"num_layers": 2, "bidirectional": True, "batch_first": True, **OPTIONS[cell], **options}
    layer = make_pruned(cell, **everything).requires_grad_(True)
    for name in NAMES:
        compute(layer, name)
        for part in dict(layer.named_parameters()).values():
            if part.requires_grad and part.dim() == 2 and part.shape[1] == 1:
                nn.init.uniform_(part)  # the norms: such that the computed weight is not the original one
    return nn.Sequential(layer)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_a_parametrized_layer_is_converted_as_it_is_now(cell, kind):
    model = build(cell, PARAMETRIZATIONS[kind]).eval()
    x = torch.randn(2, 4, 5)
    before = copy.deepcopy(model.state_dict())
    expected = model(x)[0].detach()
    model.train()
    fast = to_sparse(model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())  # no step of a norm
    assert type(fast[0]).__name__ == f"Persistent{cell.__name__}"
    torch.testing.assert_close(fast(x)[0], expected, atol=1e-5, rtol=1e-5)
    dense = to_dense(fast)[0]
    assert type(dense) is cell
    assert_same_bits(dense.weight_hh_l0, model.eval()[0].weight_hh_l0)
    assert parametrize.is_parametrized(model[0])


def test_members_of_a_class_are_still_not_lost():
    class Stateful(nn.GRU):
        def initial_state(self): ...

    layer = other_weight_norm(Stateful(3, 4), "weight_hh_l0")
    with pytest.raises(ValueError, match=r"'' is a ParametrizedStateful, which would lose initial_state; derive"):
        to_sparse(layer)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", HOOKS)
def test_the_call_that_undoes_a_hook_is_named_and_works(cell, kind):
    model = build(cell, HOOKS[kind])
    x = torch.randn(2, 4, 5)
    expected = model(x)[0].detach()
    namespace = {"torch": torch, "model": model}
    for name in NAMES:
        with pytest.raises(ValueError, match=rf"^0.{name} is computed by a hook .* from {name}_") as caught:
            to_sparse(model)
        call = str(caught.value).partition("again by ")[2].partition(", of a copy")[0]
        assert call.endswith(f".{REMOVALS[kind].__name__}(model.get_submodule('0'), '{name}')")
        exec(call, namespace)
    torch.testing.assert_close(to_sparse(model)(x)[0], expected, atol=1e-5, rtol=1e-5)


def test_a_layer_by_itself_and_what_nobody_knows():
    layer = prune.identity(nn.GRU(3, 4), "weight_hh_l0")
    with pytest.raises(ValueError, match=r"^weight_hh_l0 .* by torch.nn.utils.prune.remove\(layer, 'weight_hh_l0'\)"):
        to_sparse(layer)
    layer = nn.GRU(3, 4)
    weight: Any = layer._parameters.pop("weight_hh_l0")
    layer.weight_hh_l0 = weight.detach() * 0.5  # as libraries drop weights
    with pytest.raises(ValueError, match="weight_hh_l0 is no parameter, but computed by something unknown"):
        to_sparse(layer)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", [*HOOKS, *(f"parametrized: {kind}" for kind in PARAMETRIZATIONS)])
def test_a_report_counts_computed_weights(cell, kind):
    name = kind.removeprefix("parametrized: ")
    model = build(cell, HOOKS[name] if kind in HOOKS else PARAMETRIZATIONS[name])
    model.train()
    before = copy.deepcopy(model.state_dict())
    report = sparsity_report(model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    plain = copy.deepcopy(make_pruned(cell, num_layers=2, bidirectional=True, **OPTIONS[cell]))
    with torch.no_grad():
        for weight in NAMES:
            getattr(plain, weight).copy_(read_weight(model[0], weight))
    expected = sparsity_report(nn.Sequential(plain))
    assert {weight.name: weight for weight in report.weights} == {weight.name: weight for weight in expected.weights}
    assert {tensor.name for tensor in report.others} == {tensor.name for tensor in expected.others}
    assert report.computed == ()


def test_a_report_of_a_cell():
    cell = prune.ln_structured(nn.GRUCell(3, 16), "weight_hh", 0.5, n=2, dim=1)
    assert [(weight.name, weight.density) for weight in sparsity_report(cell).weights] == [
        ("weight_ih", 1.0),
        ("weight_hh", 0.5),
    ]


@pytest.mark.parametrize("kind", ["prune", "weight norm", "weight norm of all", "weight norm of columns"])
def test_a_report_of_a_state_that_tells_how_weights_are_computed(kind):
    dims: dict[str, Any] = {"weight norm of all": None, "weight norm of columns": 1}
    compute = HOOKS["prune"] if kind == "prune" else lambda layer, name: weight_norm(layer, name, dims.get(kind, 0))
    model = build(nn.GRU, compute)
    weights, unknown = join_parts(model.state_dict())
    assert unknown == ()
    for name in NAMES:
        torch.testing.assert_close(weights[f"0.{name}"], read_weight(model[0], name))
    assert sparsity_report(model.state_dict()) == sparsity_report(model)


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_a_state_does_not_tell_what_a_parametrization_computes(kind):
    model = build(nn.GRU, PARAMETRIZATIONS[kind])
    report = sparsity_report(model.state_dict())
    assert report.computed == ("0.weight_hh_l0", "0.weight_ih_l1_reverse")
    assert "Computed by a parametrization, from tensors below: 0.weight_hh_l0, 0.weight_ih_l1_reverse;" in str(report)
    assert "Computed by" not in str(sparsity_report(model))


def test_a_state_of_which_all_weights_are_parametrized():
    layer = nn.Sequential(other_weight_norm(other_weight_norm(nn.GRU(3, 4), "weight_hh_l0"), "weight_ih_l0"))
    assert str(sparsity_report(layer.state_dict())).startswith(
        "No recurrent layer: no weight_hh of an nn.RNN, nn.GRU or nn.LSTM that is stored as it is.\n\nComputed by"
    )


@pytest.mark.parametrize(
    "second",
    [
        {},
        {"weight_hh_l0_v": "text"},
        {"weight_hh_l0_v": torch.ones(3, 3)},
        {"weight_hh_l0_v": torch.ones(12, 4, dtype=torch.int32)},
        {"weight_hh_l0_v": torch.ones(12, 4).to_sparse()},
        {"weight_hh_l0_v": torch.tensor(1.0)},
    ],
)
def test_parts_that_do_not_belong_together_stay(second):
    state = {"weight_hh_l0_g": torch.ones(12, 1), "weight_hh_l0_orig": torch.ones(12, 4), **second}
    assert join_parts(state) == (state, ())


def test_what_is_computed_by_what():
    layer: Any = prune.identity(other_weight_norm(nn.GRU(3, 4, 2), "weight_ih_l0"), "weight_ih_l1")
    assert computed_weight(layer, "weight_hh_l0") is None
    by_class, by_hook = computed_weight(layer, "weight_ih_l0"), computed_weight(layer, "weight_ih_l1")
    assert by_class is not None
    assert by_hook is not None
    assert by_class.parts == ("parametrizations.weight_ih_l0.original0", "parametrizations.weight_ih_l0.original1")
    assert by_hook.parts == ("weight_ih_l1_orig", "weight_ih_l1_mask")
    assert set(by_class.parts + by_hook.parts) <= layer.state_dict().keys()


def test_torch_pruning_becomes_ours_once_it_is_made_permanent():
    layer = prune.ln_structured(nn.GRU(16, 16), "weight_hh_l0", 0.9, n=2, dim=1)
    prune.ln_structured(layer, "weight_ih_l0", 0.9, n=2, dim=1)
    for name in ("weight_hh_l0", "weight_ih_l0"):
        prune.remove(layer, name)
    fast = to_sparse(sparsify(layer))
    assert isinstance(fast, PersistentGRU)
    assert fast.density < 0.2


def test_a_report_where_clean_names_would_be_the_same():
    def normed():
        return parametrizations.weight_norm(nn.GRU(3, 16), "weight_hh_l0")

    model = nn.ModuleDict({"rnn": normed(), "module": nn.ModuleDict({"rnn": normed()})})
    names = {weight.name for weight in sparsity_report(model).weights}
    assert names == {f"{rnn}.weight_{kind}_l0" for rnn in ("rnn", "module.rnn") for kind in ("ih", "hh")}
