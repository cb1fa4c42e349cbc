"""The teacher of a Distillation: how it is called, what it taught, and where it is."""

import copy
from typing import Any

import pytest
import torch
from distillation_models import TINY, Net, Speller, X, changed, expected
from pruner_training import gru
from torch import nn

from triton_sparse_rnn import Pruner
from triton_sparse_rnn.pruning import Distillation, OneShot, divergence


def test_the_copy_is_a_frozen_dense_teacher_of_its_own():
    model = Net(dropout=0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    pruner = Pruner(model, OneShot(sparsity=0.5, step=1))
    pruner.attach(optimizer)
    model(X).square().mean().backward()  # gradients and hooks of the pruner are not copied
    names, keys = [name for name, _ in model.named_parameters()], list(model.state_dict())
    dense = copy.deepcopy(model).eval()
    distillation = Distillation(model)
    for _ in range(3):
        optimizer.zero_grad()
        (model(X).square().mean() + distillation.loss()).backward()
        optimizer.step()
        torch.testing.assert_close(distillation.taught, dense(X))
        assert distillation.taught.grad_fn is None
    assert pruner.sparsity == pytest.approx(0.5, abs=0.05)
    assert [name for name, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == keys
    teacher: Any = distillation._teacher
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    assert not any(module._forward_hooks for module in (teacher, teacher.head))  # its recurrent layers are recorded


def test_a_given_teacher_is_called_in_eval_mode_and_left_as_it_is():
    model, teacher = Net(), Net(dropout=0.9)
    teacher.inner.eval()
    distillation = Distillation(model, teacher)
    model(X)
    distillation.loss()
    taught = distillation.teacher(X)
    assert taught.grad_fn is None
    assert [module.training for module in teacher.modules()] == [True, False, True, True, True]
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    torch.testing.assert_close(taught, teacher.eval()(X))


def test_the_teacher_gets_the_arguments_of_the_last_call():
    model = Speller()
    distillation = Distillation(model)
    teacher: Any = distillation._teacher
    _, state = model(x=X)
    model(X, state, scale=2.0)
    distillation.loss()
    assert teacher.heard == [(state, 2.0)]


@pytest.mark.parametrize("order", ["after", "before"])
def test_a_loop_that_carries_a_state_calls_the_teacher_itself(order):
    model, dense = Speller(), Speller()
    distillation = Distillation(model, dense)
    state = teacher_state = wanted_state = taught = None
    other = copy.deepcopy(dense)
    for step in range(3):
        x = X + step
        if order == "before":
            taught, teacher_state = distillation.teacher(x, teacher_state)
        y, state = model(x, None if state is None else state.detach())
        if order == "after":
            taught, teacher_state = distillation.teacher(x, teacher_state)
        wanted, wanted_state = other(x, wanted_state)
        torch.testing.assert_close(taught, wanted)
        assert distillation.loss().item() == pytest.approx(expected(y, wanted), rel=1e-5)
        assert distillation.taught[0] is taught
    assert len(dense.heard) == 3


def test_a_call_of_the_teacher_for_something_else_is_not_taken():
    model = Speller()
    distillation = Distillation(model)
    distillation.teacher(X + 1)
    y, _ = model(X)
    assert distillation.loss().item() == pytest.approx(0, abs=TINY)
    torch.testing.assert_close(distillation.taught[0], y)


def test_what_was_taught():
    model = Net()
    distillation: Any = Distillation(model, layers=["inner"])
    assert distillation.taught is None
    y = model(X)
    torch.testing.assert_close(distillation.taught, y)  # before loss() and after it: the teacher is called once
    taught = distillation.taught
    distillation.loss()
    assert distillation.taught is taught
    model.eval()(X + 1)
    assert distillation.taught is taught
    model.train()(X + 1)
    assert (distillation.taught - y).abs().max() > 1e-2


def test_a_teacher_called_in_inference_mode():
    model = Net()
    distillation = Distillation(model, changed(model))
    model(X)
    with torch.inference_mode():
        distillation.teacher(X)
    distillation.loss().backward()
    assert model.inner.weight_hh_l0.grad is not None


def test_two_teachers():
    model = Net()
    first, second = Distillation(model), Distillation(model, changed(model))
    model(X)
    assert first.loss().item() == pytest.approx(0, abs=TINY)
    assert second.loss().item() > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [True, False])
def test_autocast(dtype, inside):
    class Halved(nn.Module):
        def __init__(self):
            super().__init__()
            self.widen, self.rnn = nn.Linear(5, 5), gru(5, 7, batch_first=True)
            self.head = nn.Linear(7, 2)

        def forward(self, x):
            return self.head(self.rnn(self.widen(x).float())[0])

    model = Halved()
    teacher = changed(model)
    distillation = Distillation(model, teacher)
    wanted = expected(model.rnn(model.widen(X))[0], teacher.rnn(teacher.widen(X))[0])
    with torch.autocast("cpu", dtype=dtype):
        scores = model(X)
        loss: Any = distillation.loss() if inside else None
    loss = distillation.loss() if loss is None else loss
    assert distillation.taught.dtype == scores.dtype == dtype
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted, rel=0.05)
    model(X)
    with torch.autocast("cpu", dtype=dtype):
        assert distillation.taught.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_teacher_follows_the_models_dtype(dtype):
    model = Speller()
    distillation = Distillation(model)
    model.to(dtype)
    model(X.to(dtype))
    loss = distillation.loss()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert distillation.taught[0].dtype == dtype
    assert loss.item() == pytest.approx(0, abs=1e-4 if dtype == torch.bfloat16 else TINY)


def test_the_teacher_follows_the_model_to_its_device():
    model = Speller().to("meta")
    distillation = Distillation(model, Speller())
    model(X.to("meta"))
    loss = distillation.loss()
    assert loss.is_meta
    assert distillation.taught[0].is_meta


def test_predictions_only():
    model, wide = Net(), Net(hidden=32, outer=9)
    with pytest.raises(
        ValueError, match=r"inner returns 16 values for each step, and 32 .* layers=\(\)\), and divergence"
    ):
        Distillation(model, wide)
    distillation = Distillation(model, wide, layers=())
    scores = model(X)
    loss = divergence(scores, distillation.taught)
    loss.backward()
    torch.testing.assert_close(loss, divergence(scores, wide(X)))
    assert model.inner.weight_hh_l0.grad is not None
    assert repr(distillation) == "Distillation(no layers, weight=1.0)"
    with pytest.raises(ValueError, match=r"loss\(\) has no layers to compare"):
        distillation.loss()
