"""Who else writes: pruned weights that are not zero, and trainings in which the attached optimizer does not step."""

import copy
import math
import warnings
from typing import Any

import optimizer_stand_ins
import pytest
import torch
from optimizer_stand_ins import Average, HookedLookahead, Lookahead, Sam
from pruner_training import NOW, attached, backward, gru, masked_everywhere, train
from torch import nn

from triton_sparse_rnn.pruning import ConstantMask, OneShot, PolynomialDecay, Pruner
from triton_sparse_rnn.pruning.watch import PrunedSamples

BEHIND = (
    r"pruned weights of weight_ih_l0, weight_hh_l0 were written to since the step of Adam .*pruner\.attach\(lookahead"
)
NO_STEP = (
    r"weight_hh_l0 was written to before each of the last 3 backward passes, but the Adam .* no step.*attach\(that"
)


def zeros_hold(pruner):
    return pruner.sparsity > 0 and not any(
        weight.parameter[~pruner.masks[weight.name]].any() for weight in pruner.weights
    )


@pytest.mark.parametrize("wrapper", [Lookahead, HookedLookahead])
def test_a_wrapper_around_the_attached_optimizer_is_found_out(wrapper):
    layer = gru(5, 7)
    pruner, optimizer = attached(layer, NOW)
    lookahead = wrapper(optimizer, k=3)
    train(layer, lookahead, 3)
    assert not zeros_hold(pruner)
    with pytest.warns(UserWarning, match=BEHIND) as caught:
        train(layer, lookahead, 7)
    assert len(caught) == 1  # said once
    assert caught[0].filename == optimizer_stand_ins.__file__  # where the attached optimizer is called
    train(layer, lookahead, 1)
    assert masked_everywhere(pruner, optimizer)


def test_averages_that_are_copied_into_the_model_are_found_out():
    layer = gru(5, 7)
    pruner, optimizer = attached(layer, NOW)
    average = Average(layer)
    train(layer, optimizer, 3, after=average.update)
    average.copy_to_model()
    with pytest.warns(UserWarning, match=BEHIND):
        train(layer, optimizer, 1)
    assert masked_everywhere(pruner, optimizer)


def test_a_checkpoint_that_is_not_pruned_is_found_out():
    layer = gru(5, 7)
    dense = copy.deepcopy(layer.state_dict())
    pruner, optimizer = attached(layer, NOW)
    train(layer, optimizer, 2)
    layer.load_state_dict(dense)
    with pytest.warns(UserWarning, match=BEHIND):
        optimizer.step()  # with gradients that are there already
    assert zeros_hold(pruner)


def test_writes_to_one_weight_name_that_weight():
    layer = gru(5, 7)
    pruner, optimizer = attached(layer, NOW)
    train(layer, optimizer, 2)
    with torch.no_grad():
        layer.weight_hh_l0.add_(1)
    with pytest.warns(UserWarning, match="pruned weights of weight_hh_l0 were"):
        train(layer, optimizer, 1)
    assert zeros_hold(pruner)


def test_a_state_is_not_saved_beside_weights_that_came_back():
    layer = gru(5, 7)
    pruner, optimizer = attached(layer, NOW)
    lookahead = Lookahead(optimizer, k=3)
    train(layer, lookahead, 3)
    saved = layer.state_dict()
    with pytest.warns(UserWarning, match=BEHIND):
        pruner.state_dict()
    assert zeros_hold(pruner)
    assert not saved["weight_hh_l0"][~pruner.masks["weight_hh_l0"]].any()  # it is the weight itself


def test_steps_by_hand_find_it_out_at_the_next_backward_pass_and_write_nothing_there():
    layer = gru(5, 7)
    dense = copy.deepcopy(layer.state_dict())
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    pruner = Pruner(layer, NOW)
    train(layer, optimizer, 2, after=lambda: pruner.step(optimizer))
    layer.load_state_dict(dense)
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match=r"of weight_[ih]h_l0 were written to since pruner\.step\(\) set them"):
        backward(layer)
    assert torch.equal(layer.weight_hh_l0, dense["weight_hh_l0"])
    optimizer.step()
    pruner.step(optimizer)
    assert masked_everywhere(pruner, optimizer)


@pytest.mark.parametrize("block_size", [(1, 1), (2, 3), (4, 1), (7, 5)])
@pytest.mark.parametrize("tie_gates", [False, True])
def test_samples_are_pruned_places_spread_over_each_weight(block_size, tie_gates):
    layer = gru(11, 13)
    pruner, optimizer = attached(layer, OneShot(sparsity=0.6, step=1), block_size=block_size, tie_gates=tie_gates)
    train(layer, optimizer, 1)
    for weight in pruner.weights:
        places = pruner._masks.samples._places[weight.name]
        blocks = int((~pruner._masks.blocks[weight.name]).expand(3, -1, -1).sum())
        assert len(places.unique()) == len(places) == min(PrunedSamples.PLACES, blocks)
        assert not pruner.masks[weight.name].flatten()[places].any()
        assert {int(place) // (13 * weight.parameter.shape[1]) for place in places} == {0, 1, 2}


def test_samples_do_not_wait_for_another_device_at_every_look(monkeypatch):
    """As a GPU is looked at, whose tensors say "cuda"."""
    layer = gru(5, 7)
    pruner, optimizer = attached(layer, NOW)
    train(layer, optimizer, 1)
    samples = pruner._masks.samples
    monkeypatch.setattr(samples, "_answers_at_once", lambda parameter: False)
    with torch.no_grad():
        layer.weight_hh_l0.add_(1)
    looks = [samples.written(pruner.weights) for _ in range(2)]
    with torch.no_grad():
        layer.weight_hh_l0.zero_()
    looks += [samples.written(pruner.weights) for _ in range(2 * samples.PERIOD)]
    assert sum(map(bool, looks)) == 1
    assert ["weight_hh_l0"] in looks
    with torch.no_grad():
        layer.weight_ih_l0.add_(1)
    assert samples.written(pruner.weights, wait=True) == ["weight_ih_l0"]
    pruner._masks.apply_everywhere(())


def test_an_optimizer_made_anew_is_noticed():
    layer = gru(5, 7)
    pruner, optimizer = attached(layer, OneShot(sparsity=0.5, step=2))
    train(layer, optimizer, 1)
    other = torch.optim.SGD(layer.parameters(), lr=0.1)
    train(layer, other, 3)  # a model may be written to for other reasons
    with pytest.warns(UserWarning, match=NO_STEP) as caught:
        train(layer, other, 9)
    assert len(caught) == 1  # said once
    assert (pruner.step_count, pruner.sparsity) == (1, 0)


def test_an_optimizer_made_anew_can_be_attached():
    layer = gru(5, 7)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    pruner = Pruner(layer, OneShot(sparsity=0.5, step=2))
    handle = pruner.attach(optimizer)
    train(layer, optimizer, 1)
    handle.remove()
    other = torch.optim.SGD(layer.parameters(), lr=0.1)
    pruner.attach(other)
    train(layer, other, 4)
    assert pruner.step_count == 5
    assert masked_everywhere(pruner, other)


def test_a_step_that_calls_no_hooks_is_noticed():
    layer = gru(5, 7)
    optimizer: Any = attached(layer, NOW)[1]

    def own_step():
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter -= 0.1 * parameter.grad

    optimizer.step = own_step
    with pytest.warns(UserWarning, match="the Adam that the pruner is attached to has made no step"):
        train(layer, optimizer, 5)


class TestNothingIsSaid:
    """Warnings are errors here."""

    def test_of_accumulated_gradients(self):
        layer = gru(5, 7)
        pruner, optimizer = attached(layer, NOW)
        for step in range(3):
            for seed in range(6):
                backward(layer, seed)
                layer.flatten_parameters()
            if step:
                optimizer.step()
                optimizer.zero_grad()
        assert masked_everywhere_without_gradients(pruner)

    def test_of_writes_that_change_nothing_in_accumulated_gradients(self):
        layer = gru(5, 7)
        pruner, _ = attached(layer, NOW)
        for seed in range(9):
            with torch.no_grad():  # as flatten_parameters() on a GPU
                layer.weight_hh_l0.copy_(layer.weight_hh_l0.clone())
            backward(layer, seed)
        assert pruner.step_count == 0

    @pytest.mark.parametrize("fused", [False, True])
    def test_of_steps_that_a_scaler_skips(self, fused):
        layer = gru(5, 7)
        pruner, optimizer = attached(layer, NOW, torch.optim.Adam(layer.parameters(), fused=fused))
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        for _ in range(8):
            optimizer.zero_grad()
            scaler.scale(layer(torch.randn(4, 3, 5))[0].square().mean()).backward()
            layer.bias_ih_l0.grad[0] = math.inf
            scaler.step(optimizer)
            scaler.update()
        assert pruner.step_count == 0

    def test_of_mixed_precision(self):
        layer = gru(5, 7)
        pruner, optimizer = attached(layer, NOW)
        for seed in range(6):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                backward(layer, seed)
            optimizer.step()
        assert masked_everywhere(pruner, optimizer)

    @pytest.mark.parametrize("by_hand", [False, True])
    def test_of_two_backward_passes_a_step(self, by_hand):
        layer = gru(5, 7)
        sam = Sam(layer.parameters(), lr=0.02)
        pruner = Pruner(layer, NOW)
        if not by_hand:
            pruner.attach(sam.base_optimizer)
        for seed in range(6):
            for step in (sam.first_step, sam.second_step):
                sam.zero_grad()
                backward(layer, seed)
                step()
            if by_hand:
                pruner.step(sam)
        assert masked_everywhere(pruner, sam)

    @pytest.mark.parametrize("by_hand", [False, True])
    def test_of_many_backward_passes_in_a_closure(self, by_hand):
        layer = gru(5, 7)
        optimizer = torch.optim.LBFGS(layer.parameters(), lr=0.5, max_iter=6)
        pruner = Pruner(layer, PolynomialDecay(final_sparsity=0.8, begin_step=0, end_step=4, frequency=1))
        if not by_hand:
            pruner.attach(optimizer)

        def closure():
            optimizer.zero_grad()
            loss = layer(torch.ones(4, 3, 5))[0].square().mean()
            loss.backward()
            return loss

        for _ in range(6):
            optimizer.step(closure)
            if by_hand:
                pruner.step(optimizer)
        assert zeros_hold(pruner)
        assert pruner.step_count == 6

    def test_of_training_by_another_after_the_handle_is_removed(self):
        layer = gru(5, 7)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
        pruner = Pruner(layer, NOW)
        with pruner.attach(optimizer):
            train(layer, optimizer, 2)
        train(layer, torch.optim.SGD(layer.parameters(), lr=0.1), 8)
        pruner.state_dict()
        assert not zeros_hold(pruner)
        pruner.attach(optimizer)
        train(layer, optimizer, 2)
        assert masked_everywhere(pruner, optimizer)

    @pytest.mark.parametrize("first", ["model", "pruner"])
    def test_of_going_back_to_a_checkpoint(self, first):
        layer = gru(5, 7)
        pruner, optimizer = attached(layer, PolynomialDecay(final_sparsity=0.8, begin_step=0, end_step=8, frequency=1))
        train(layer, optimizer, 3)
        saved = copy.deepcopy((layer.state_dict(), pruner.state_dict()))
        train(layer, optimizer, 4)
        if first == "model":
            layer.load_state_dict(saved[0])
        pruner.load_state_dict(saved[1])
        if first == "pruner":
            layer.load_state_dict(saved[0])
        train(layer, optimizer, 2)
        assert masked_everywhere(pruner, optimizer)

    def test_of_weights_that_are_loaded_before_each_of_many_gradients(self):
        layer = gru(5, 7)
        pruner, optimizer = attached(layer, NOW)
        for _ in range(3):
            layer.load_state_dict(gru(5, 7).state_dict() if not pruner.step_count else layer.state_dict())
            backward(layer)
            optimizer.step()
        assert pruner.step_count == 3

    def test_of_pruned_places_with_gradients_set_by_hand(self):
        layer = gru(5, 7)
        pruner, optimizer = attached(layer, NOW)
        for _ in range(5):
            for parameter in layer.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        assert masked_everywhere(pruner, optimizer)

    def test_of_a_model_that_moves_to_another_dtype(self):
        layer = gru(5, 7)
        pruner, optimizer = attached(layer, NOW, torch.optim.SGD(layer.parameters(), lr=0.1))
        train(layer, optimizer, 2)
        layer.double()
        layer.zero_grad()
        for _ in range(4):
            layer(torch.randn(4, 3, 5, dtype=torch.float64))[0].sum().backward()
            optimizer.step()
            layer.zero_grad()
        assert zeros_hold(pruner)

    def test_of_a_constant_mask(self):
        layer = gru(6, 8)
        with torch.no_grad():
            for weight in (layer.weight_ih_l0, layer.weight_hh_l0):
                weight.view(3, 2, 4, -1)[:, 0, :, ::2] = 0
        pruner, optimizer = attached(layer, ConstantMask(), block_size=(4, 1))
        train(layer, optimizer, 5)
        assert masked_everywhere(pruner, optimizer)

    def test_of_weights_that_share_no_gradient(self):
        model = nn.ModuleList([gru(5, 7), gru(5, 7)])
        pruner, optimizer = attached(model, NOW, torch.optim.SGD(model.parameters(), lr=0.1))
        for seed in range(8):
            optimizer.zero_grad()
            backward(model[seed % 2], seed)
            optimizer.step()
        assert zeros_hold(pruner)


def masked_everywhere_without_gradients(pruner):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.state_dict()
    return zeros_hold(pruner)
