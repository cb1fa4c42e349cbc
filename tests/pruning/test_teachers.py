"""Which layers a Distillation compares, and the teacher that it makes of a model."""

import copy
from typing import Any

import pytest
import torch
from pruner_training import gru, train, zero_half
from torch import nn

from triton_sparse_rnn.pruning import Distillation, OneShot, Pruner
from triton_sparse_rnn.pruning.teachers import frozen_copy

X = torch.linspace(-2, 2, 4 * 3 * 5).sin().view(4, 3, 5)


def make_model(**layers) -> Any:
    return nn.ModuleDict(layers or {"encoder": gru(5, 7), "decoder": nn.LSTM(7, 6, proj_size=2, bidirectional=True)})


def test_other_kinds_of_layers_can_be_compared_where_outputs_are_of_one_size():
    model, teacher = make_model(), make_model(encoder=nn.LSTM(5, 9, proj_size=7), decoder=gru(7, 4), more=gru(1, 1))
    assert Distillation(model, teacher).layers == ("encoder", "decoder")


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        (make_model(encoder=gru(5, 7)), {}, "teacher has no recurrent layer 'decoder', only encoder: leave it out by"),
        (nn.Linear(2, 2), {}, "teacher has no recurrent layer 'encoder', only none"),
        (gru(5, 7), {"layers": ["encoder"]}, "no recurrent layer 'encoder', only the model itself"),
        (make_model(encoder=gru(5, 8)), {"layers": ["encoder"]}, "encoder returns 7 values for each step, and 8 in"),
        (None, {"layers": ["encoder", "attention*"]}, r"'attention\*', which matches none of .* encoder, decoder"),
    ],
)
def test_layers_that_do_not_match(teacher, options, message):
    with pytest.raises(ValueError, match=message):
        Distillation(make_model(), teacher, **options)


def test_a_model_without_layers():
    with pytest.raises(ValueError, match=r"model has no nn\.RNN, nn\.GRU or nn\.LSTM to compare"):
        Distillation(nn.Linear(2, 2))
    linear = nn.Linear(2, 2)
    distillation = Distillation(linear, layers=())
    y = linear(torch.ones(2))
    torch.testing.assert_close(distillation.taught, y)


def test_a_teacher_that_is_a_part_of_the_model():
    model = make_model()
    with pytest.raises(ValueError, match="teacher shares the whole model with the model, and would change as it does"):
        Distillation(model, model, layers=())
    with pytest.raises(ValueError, match="teacher shares decoder with the model"):
        Distillation(model, make_model(encoder=gru(5, 7), decoder=model["decoder"]))
    other = nn.ModuleDict({"encoder": gru(5, 4), "decoder": nn.GRU(5, 4)})
    with pytest.raises(ValueError, match="teacher shares encoder with the model"):
        Distillation(other, make_model(encoder=other["decoder"], decoder=gru(5, 4)))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("model",), {}, "model must be an nn.Module, got str"),
        ((make_model(), {}), {}, "teacher must be an nn.Module, got dict"),
        ((make_model(),), {"layers": "encoder"}, r"layers must be a sequence of globs, such as .* got 'encoder'"),
        ((make_model(),), {"layers": [1]}, r"layers must be a sequence of globs, such as .* got \[1\]"),
        ((make_model(),), {"layers": 1}, r"layers must be a sequence of globs, such as .* got 1"),
    ],
)
def test_wrong_types(arguments, options, message):
    with pytest.raises(TypeError, match=message):
        Distillation(*arguments, **options)


def test_a_tied_layer_counts_once():
    layer = gru(5, 5)
    assert Distillation(make_model(first=layer, second=layer)).layers == ("first",)


def test_a_pruned_model_is_no_dense_teacher():
    layer = zero_half(gru(6, 8))
    with pytest.warns(UserWarning, match=r"25 % of the recurrent and input weights of model are zeros, .* resumed"):
        Distillation(layer)
    Distillation(layer, copy.deepcopy(layer))  # given on purpose


def test_the_copy_has_no_hooks_of_ours_and_none_of_a_pruner():
    layer = gru(5, 7)
    heard = []
    layer.register_forward_hook(lambda *call: heard.append(call))
    first = Distillation(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    Pruner(layer, OneShot(sparsity=0.5, step=1)).attach(optimizer)
    copied: Any = frozen_copy(layer)
    assert len(copied._forward_hooks) == 1
    assert not copied._forward_pre_hooks
    copied.train()(X)
    assert len(heard) == 1
    with pytest.raises(RuntimeError, match="call the model"):
        first.loss()
    train(layer, optimizer, 2)
    copied.requires_grad_(True).weight_hh_l0.sum().backward()
    assert copied.weight_hh_l0.grad.all()


def test_a_cached_state_does_not_hinder_copying():
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = gru(5, 7)
            self.state = None

        def forward(self, x):
            y, self.state = self.rnn(x, self.state)
            return y

    model = Stateful()
    model(X)
    distillation = Distillation(model)
    y = model(X)
    distillation.loss()
    torch.testing.assert_close(distillation.taught, y)


def test_weights_that_hooks_compute_are_computed_in_the_copy():
    model: Any = nn.utils.parametrizations.weight_norm(gru(5, 7), "weight_hh_l0")
    y, _ = model(X)
    distillation = Distillation(model)
    with torch.no_grad():
        model.parametrizations.weight_hh_l0.original0.mul_(2)
    assert not torch.allclose(model(X)[0], y, rtol=1e-2)
    torch.testing.assert_close(distillation.taught[0], y)


def test_a_model_that_a_copy_would_go_on_running_is_refused():
    layer = gru(5, 7)
    layer.forward = lambda x: nn.GRU.forward(layer, 2 * x)
    with pytest.raises(TypeError, match=r"model cannot be copied: .*forward.*; make the teacher yourself, and give it"):
        Distillation(layer)
    teacher = gru(5, 7)
    distillation = Distillation(layer, teacher)
    layer(X)
    assert distillation.loss().item() > 0


def test_a_model_without_values_is_copied():
    layer = gru(5, 7, device="meta")
    distillation = Distillation(layer)
    layer(X.to("meta"))
    assert distillation.loss().is_meta
