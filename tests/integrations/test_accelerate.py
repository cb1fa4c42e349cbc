"""Optimizers as accelerate and Lightning's Fabric prepare them, in a loop of one's own."""

import math

import pytest
import torch
from torch import nn

from triton_sparse_rnn import PolynomialDecay, Pruner
from triton_sparse_rnn.pruning.weight_masks import WeightMasks

SCHEDULE = PolynomialDecay(initial_sparsity=0.3, final_sparsity=0.8, begin_step=0, end_step=6, frequency=2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.GRU(3, 16)


def batches(count):
    return torch.randn(count, 5, 4, 3, generator=torch.Generator().manual_seed(1)).unbind()


def zeros_hold(pruner):
    return pruner.sparsity > 0 and not any(
        weight.parameter[~pruner.masks[weight.name]].any() for weight in pruner.weights
    )


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")
    yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.mark.parametrize("prepared", [True, False])
def test_accelerates_optimizer_counts_the_steps_that_it_makes(prepared, accelerator, model):
    inner = torch.optim.Adam(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 4)
    model, optimizer, scheduler = accelerator.prepare(model, inner, scheduler)
    pruner = Pruner(model, SCHEDULE, pattern=(4, 1))
    with pruner.attach(optimizer if prepared else inner):
        for number, x in enumerate(batches(16)):
            with accelerator.accumulate(model):
                accelerator.backward(model(x)[0].square().mean())
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            assert pruner.step_count == (number + 1) // 2
            assert number == 0 or zeros_hold(pruner)
        state = optimizer.state[pruner.weights[0].parameter]["exp_avg"]
        assert not state[~pruner.masks[pruner.weights[0].name]].any()
    assert pruner.finished
    assert "step" not in vars(optimizer)


@pytest.fixture
def count_of_maskings(monkeypatch):
    calls = []
    mask = WeightMasks.apply_everywhere
    monkeypatch.setattr(WeightMasks, "apply_everywhere", lambda *args: calls.append(1) or mask(*args))
    return lambda: len(calls)


@pytest.mark.parametrize("kind", ["accelerate", "fabric", "lightning"])
def test_wrappers_that_write_nothing_cost_no_second_masking(kind, model, request, count_of_maskings):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    if kind == "accelerate":
        request.getfixturevalue("accelerator")
        optimizer = pytest.importorskip("accelerate.optimizer").AcceleratedOptimizer(optimizer)
    elif kind == "fabric":
        fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
        _, optimizer = fabric.setup(model, optimizer)
    else:
        optimizer = pytest.importorskip("lightning.pytorch.core.optimizer").LightningOptimizer(optimizer)
        optimizer._strategy = pytest.importorskip("lightning.pytorch.strategies").SingleDeviceStrategy()
        optimizer._strategy._lightning_module = None
        optimizer._strategy.optimizer_step = lambda optimizer, closure, **others: optimizer.step(closure)
    pruner = Pruner(model, SCHEDULE, pattern=(4, 1))
    pruner.attach(optimizer)
    for number, x in enumerate(batches(3)):
        optimizer.zero_grad()
        model(x)[0].square().mean().backward()
        optimizer.step()
        assert pruner.step_count == count_of_maskings() == number + 1
        assert zeros_hold(pruner)


def test_accelerates_scaler_skips_steps(accelerator, model):
    accelerate_optimizer = pytest.importorskip("accelerate.optimizer").AcceleratedOptimizer
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    optimizer = accelerate_optimizer(torch.optim.Adam(model.parameters(), lr=0.01), scaler=scaler)
    pruner = Pruner(model, SCHEDULE, pattern=(4, 1))
    pruner.attach(optimizer)
    for number, x in enumerate(batches(9)):
        scaler.scale(model(x)[0].square().mean()).backward()
        if number % 3 == 1:
            model.get_parameter("bias_ih_l0").grad[0] = math.inf
        optimizer.step()
        assert optimizer.step_was_skipped == (number % 3 == 1)
        optimizer.zero_grad()
    assert pruner.step_count == 6
    assert zeros_hold(pruner)


@pytest.mark.parametrize("prepared", [True, False])
def test_fabrics_optimizer(prepared, model):
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    inner = torch.optim.Adam(model.parameters(), lr=0.01)
    wrapped, optimizer = fabric.setup(model, inner)
    pruner = Pruner(model, SCHEDULE, pattern=(4, 1))
    with pruner.attach(optimizer if prepared else inner):
        for number, x in enumerate(batches(8)):
            optimizer.zero_grad()
            fabric.backward(wrapped(x)[0].square().mean())
            optimizer.step()
            assert pruner.step_count == number + 1
            assert zeros_hold(pruner)
    assert pruner.finished
    optimizer.step()
    assert pruner.step_count == 8
