"""The pruner under optimizers: their memory is masked, and a step that a GradScaler skips does not count."""

import math

import pytest
import torch
from pruner_training import gru
from torch import nn

from triton_sparse_rnn.pruning import OneShot, PolynomialDecay, Pruner

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.01, initial_accumulator_value=0.1),
}
VARIANTS = {"default": {}, "loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def backward(layer, seed, scaler=None):
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(seed))
    loss = layer(x)[0].square().mean()
    (loss if scaler is None else scaler.scale(loss)).backward()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_pruned_places_are_zero_in_everything_an_optimizer_remembers(kind):
    torch.manual_seed(0)
    layer = gru(5, 7)
    optimizer = OPTIMIZERS[kind](layer.parameters())
    pruner = Pruner(layer, PolynomialDecay(final_sparsity=0.8, begin_step=2, end_step=6, frequency=2), pattern=(2, 2))
    pruner.attach(optimizer)
    for seed in range(8):
        optimizer.zero_grad()
        backward(layer, seed)
        optimizer.step()
        for name, mask in pruner.masks.items():
            parameter = layer.get_parameter(name)
            state = [value for value in optimizer.state[parameter].values() if value.shape == mask.shape]
            assert state
            assert not any(tensor[~mask].any() for tensor in (parameter, *state))
            assert all(tensor[mask].all() for tensor in state)
    assert pruner.sparsity == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_a_step_that_the_scaler_skips_does_not_count(kind, variant):
    torch.manual_seed(0)
    layer = gru(5, 7)
    optimizer = kind(layer.parameters(), lr=0.01, **VARIANTS[variant])
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    pruner = Pruner(layer, OneShot(sparsity=0.5, step=3))
    pruner.attach(optimizer)
    counts = []
    for step, (overflow, unscale) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1), (1, 0), (0, 0), (0, 1)]):
        optimizer.zero_grad()
        backward(layer, step, scaler)
        if overflow:
            layer.bias_ih_l0.grad[0] = math.inf
        if unscale:
            scaler.unscale_(optimizer)
        before = layer.weight_hh_l0.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, layer.weight_hh_l0) == bool(overflow)
        counts.append((pruner.step_count, pruner.sparsity > 0))
    assert counts == [(1, False), (1, False), (2, False), (2, False), (2, False), (3, True), (4, True)]


def test_a_closure_is_one_step():
    layer = gru(5, 7)
    optimizer = torch.optim.LBFGS(layer.parameters(), lr=0.1, max_iter=4)
    pruner = Pruner(layer, OneShot(sparsity=0.5, step=1))
    pruner.attach(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = layer(torch.ones(4, 3, 5))[0].square().mean()
        loss.backward()
        return loss

    for step in (1, 2):
        optimizer.step(closure)
        assert pruner.step_count == step
        assert all(not layer.get_parameter(name)[~mask].any() for name, mask in pruner.masks.items())


def test_weights_shared_out_in_groups_and_other_parameters_are_no_matter():
    layer, head = gru(5, 7), nn.Linear(7, 2)
    optimizer = torch.optim.Adam([{"params": [layer.weight_hh_l0]}, {"params": head.parameters(), "lr": 0.1}])
    optimizer.add_param_group({"params": [layer.weight_ih_l0, layer.bias_ih_l0, layer.bias_hh_l0]})
    pruner = Pruner(layer, OneShot(sparsity=0.5, step=1))
    pruner.attach(optimizer)
    head(layer(torch.ones(4, 3, 5))[0]).sum().backward()
    optimizer.step()
    assert pruner.sparsity > 0
    assert head.weight.all()


def test_codes_and_counts_that_an_optimizer_keeps_are_left_alone():
    layer = gru(5, 7)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    codes = torch.ones_like(layer.weight_hh_l0, dtype=torch.uint8)  # as optimizers with 8-bit state hold them
    optimizer.state[layer.weight_hh_l0] = {"codes": codes, "steps": 3, "empty": None}
    pruner = Pruner(layer, OneShot(sparsity=0.5, step=1))
    pruner.attach(optimizer)
    backward(layer, 0)
    optimizer.step()
    assert pruner.sparsity > 0
    assert codes.all()
