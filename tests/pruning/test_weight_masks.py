"""Masks applied to more than the model: averages of its weights, copies of it, what other wrappers hold."""

import copy

import pytest
import torch
from pruner_training import NOW, attached, gru, masked_everywhere, pruned_gru, train
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from triton_sparse_rnn import to_sparse
from triton_sparse_rnn.pruning import OneShot, PolynomialDecay, Pruner

AVERAGES = {"swa": {}, "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}}


def pruned_in(pruner, model):
    """Whether the weights of another model are zero where the masks say so, and something else is not."""
    weights = {name.rpartition("module.")[2]: weight for name, weight in model.named_parameters()}
    return all(torch.equal(weights[name] != 0, mask) for name, mask in pruner.masks.items())


@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("when", ["always", "at the end"])
def test_an_average_of_the_weights(kind, when):
    model = nn.ModuleDict({"rnn": gru(5, 7)})
    average = AveragedModel(model, **AVERAGES[kind])
    pruner, optimizer = attached(
        model, PolynomialDecay(final_sparsity=0.8, begin_step=0, end_step=6, frequency=1), pattern=(2, 1)
    )

    def update():
        average.update_parameters(model)
        if when == "always":
            pruner.apply_masks(average)
            assert not pruner.sparsity or pruned_in(pruner, average)

    train(model["rnn"], optimizer, 9, after=update)
    pruner.apply_masks(average)
    assert pruned_in(pruner, average)
    assert masked_everywhere(pruner, optimizer)
    average.update_parameters(model)
    assert pruned_in(pruner, average)  # zeros stay when masks no longer change
    assert to_sparse(average.module.eval(), storage=(2, 1))["rnn"].density == pytest.approx(0.2, abs=0.06)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_copy_in_another_dtype_and_a_state_dict(dtype):
    layer = gru(5, 7)
    before = copy.deepcopy(layer)
    pruner, optimizer = attached(layer, NOW)
    train(layer, optimizer, 1)
    other, state = copy.deepcopy(before).to(dtype), before.state_dict()
    kept = copy.deepcopy(other)
    pruner.apply_masks(other)
    assert pruned_in(pruner, other)
    for name, parameter in kept.named_parameters():
        assert torch.equal(other.get_parameter(name), parameter * pruner.masks.get(name, torch.tensor(1)))
    pruner.apply_masks(state)
    assert pruned_in(pruner, before)


def test_infinity_and_nan_vanish():
    layer, pruner, _optimizer = pruned_gru(1)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight_hh_l0[~pruner.masks["weight_hh_l0"]] = torch.nan
        other.weight_ih_l0[~pruner.masks["weight_ih_l0"]] = torch.inf
    pruner.apply_masks(other)
    assert pruned_in(pruner, other)


def test_a_model_without_the_weights_is_refused_and_nothing_changes():
    _layer, pruner, _optimizer = pruned_gru(1)
    half = gru(5, 8)
    half.weight_ih_l0 = nn.Parameter(torch.ones(21, 5))
    with pytest.raises(ValueError, match=r"model has weight_hh_l0 of shape \(24, 8\), expected \(21, 7\)"):
        pruner.apply_masks(half)
    assert half.weight_ih_l0.all()
    with pytest.raises(ValueError, match="model lacks weight_ih_l0, which the pruner prunes"):
        pruner.apply_masks(nn.Sequential(gru(5, 7)))
    with pytest.raises(TypeError, match=r"model must be an nn\.Module or a state_dict, got int"):
        pruner.apply_masks(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda weight: weight.to_sparse(), r"torch\.sparse_coo"),
        (lambda weight: weight.to_sparse_csr(), r"torch\.sparse_csr"),
        (lambda weight: weight.numpy(), "ndarray"),
        (lambda weight: weight.to("meta"), "one on the meta device"),
        (lambda weight: weight.int(), r"torch\.int32"),
        (lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8), r"torch\.qint8"),
        (lambda weight: torch.nested.nested_tensor([weight]), "a nested one"),
        (lambda weight: None, "NoneType"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|nested tensors|deprecated)")  # of what the test makes
def test_a_second_weight_that_is_no_dense_tensor_is_refused_before_the_first_is_masked(make, got):
    layer, pruner, optimizer = pruned_gru()
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    train(layer, optimizer, 1)
    state["weight_hh_l0"] = make(state["weight_hh_l0"])
    with pytest.raises(TypeError, match=f"model must have a dense .* with values for weight_hh_l0, got {got}"):
        pruner.apply_masks(state)
    assert state["weight_ih_l0"].all()


def test_before_anything_is_pruned_nothing_changes():
    layer = gru(5, 7)
    other = copy.deepcopy(layer)
    pruner = Pruner(layer, OneShot(sparsity=0.5, step=9))
    pruner.apply_masks(other)
    assert all(map(torch.equal, other.parameters(), layer.parameters()))
