"""Pruners that are attached at once, or one after another, to the same model."""

import copy
import gc
from typing import Any

import pytest
import torch
from optimizer_stand_ins import Lookahead
from pruner_training import NOW, backward, gru, train, zeros_hold

from triton_sparse_rnn.pruning import OneShot, Pruner


def adam(layer):
    return torch.optim.Adam(layer.parameters(), lr=0.02)


def test_two_pruners_of_the_same_weights_are_refused():
    layer = gru(5, 7)
    first, second = Pruner(layer, NOW), Pruner(layer, NOW, targets={"*ih*": None})
    optimizer = adam(layer)
    handle = first.attach(optimizer)
    for other in (optimizer, adam(layer)):
        with pytest.raises(
            ValueError, match=r"another pruner .* prunes weight_hh_l0 already: call remove\(\) .*targets="
        ):
            second.attach(other)
    assert second.sparsity == 0
    handle.remove()
    second.attach(optimizer)
    train(layer, optimizer, 1)
    assert (first.step_count, second.step_count) == (0, 1)


def test_two_pruners_of_different_weights_are_fine():
    layer = gru(5, 7)
    optimizer = adam(layer)
    pruners = [Pruner(layer, NOW, targets={glob: None}) for glob in ("*ih*", "*hh*")]
    handles = [pruner.attach(optimizer) for pruner in pruners]
    train(layer, optimizer, 2)
    assert all(pruner.step_count == 2 and zeros_hold(pruner) for pruner in pruners)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("keep", ["nothing", "handle", "pruner"])
@pytest.mark.parametrize("by_hand", [False, True])
def test_a_pruner_whose_optimizer_is_gone_masks_no_gradients_of_the_next(keep, by_hand):
    """As when a cell of a notebook is run again."""
    layer = gru(5, 16)
    dense = copy.deepcopy(layer.state_dict())
    held: list[Any] = []

    def run(sparsity, steps=12):
        layer.load_state_dict(dense)
        optimizer, pruner = adam(layer), Pruner(layer, OneShot(sparsity=sparsity, step=1), pattern=(2, 1))
        if not (held and by_hand):
            held.append(pruner.attach(optimizer))
        gradients = []
        for seed in range(steps):
            optimizer.zero_grad()
            backward(layer, seed)
            gradients.append((layer.weight_hh_l0.grad != 0).float().mean().item())
            optimizer.step()
            if pruner._attachment is None:
                pruner.step(optimizer)
        held.append(pruner)
        return gradients

    gc.disable()
    try:
        run(0.9)
        held[:] = {"nothing": [None], "handle": held[:1], "pruner": held[1:]}[keep]
        gradients = run(0.3)
    finally:
        gc.enable()
    assert gradients[-1] == pytest.approx(0.7, abs=0.05)


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_step_by_hand_with_weights_of_an_attached_pruner_is_refused(by_hand):
    layer = gru(5, 7)
    first, second, optimizer = Pruner(layer, NOW), Pruner(layer, NOW), adam(layer)
    handle = first.attach(optimizer)
    with pytest.raises(ValueError, match="another pruner is attached and prunes weight_ih_l0, weight_hh_l0 already"):
        second.step(optimizer) if by_hand else second.attach(optimizer)
    handle.remove()
    second.step(optimizer)
    assert second.step_count == 1


def test_a_pruner_whose_optimizer_is_gone_stands_in_nobodys_way():
    layer = gru(5, 7)
    old = Pruner(layer, NOW)
    lookahead = Lookahead(adam(layer))
    old.attach(lookahead)
    del lookahead
    gc.collect()
    Pruner(layer, NOW).attach(adam(layer))
