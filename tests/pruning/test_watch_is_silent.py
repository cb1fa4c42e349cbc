"""Trainings of which the watch has nothing to say; warnings are errors here."""

import copy
import math
import warnings

import pytest
import torch
from optimizer_stand_ins import Sam, Several
from pruner_training import NOW, attached, backward, gru, masked_everywhere, pruned_gru, train, zero_half, zeros_hold
from torch import nn

from triton_sparse_rnn.pruning import ConstantMask, PolynomialDecay, Pruner
from triton_sparse_rnn.sparse.patterns import Blocks
from triton_sparse_rnn.sparse.picks import Picks


class TestNothingIsSaid:
    """Warnings are errors here."""

    def test_of_accumulated_gradients(self):
        layer, pruner, optimizer = pruned_gru()
        for step in range(3):
            for seed in range(6):
                backward(layer, seed)
                layer.flatten_parameters()
            if step:
                optimizer.step()
                optimizer.zero_grad()
        assert masked_everywhere_without_gradients(pruner)

    def test_of_writes_that_change_nothing_in_accumulated_gradients(self):
        layer, pruner, _ = pruned_gru()
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
        layer, pruner, optimizer = pruned_gru()
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

    @pytest.mark.parametrize(
        ("first", "pattern"), [("model", Picks()), ("model", Blocks()), ("pruner", Blocks())], ids=str
    )  # masks of picks need the weights
    def test_of_going_back_to_a_checkpoint(self, first, pattern):
        layer = gru(5, 7)
        schedule = PolynomialDecay(final_sparsity=0.8, begin_step=0, end_step=8, frequency=1)
        pruner, optimizer = attached(layer, schedule, pattern=pattern)
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
        layer, pruner, optimizer = pruned_gru()
        for _ in range(3):
            layer.load_state_dict(gru(5, 7).state_dict() if not pruner.step_count else layer.state_dict())
            backward(layer)
            optimizer.step()
        assert pruner.step_count == 3

    def test_of_pruned_places_with_gradients_set_by_hand(self):
        layer, pruner, optimizer = pruned_gru()
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
        layer = zero_half(gru(6, 8))
        pruner, optimizer = attached(layer, ConstantMask(), pattern=(4, 1))
        train(layer, optimizer, 5)
        assert masked_everywhere(pruner, optimizer)

    def test_of_a_weight_that_is_normalised_in_each_forward_pass(self):
        layer = gru(5, 7)

        @torch.no_grad()
        def normalise(module, args):
            layer.weight_hh_l0.mul_(7 / layer.weight_hh_l0.norm()).mul_(1 + 1e-6)

        layer.register_forward_pre_hook(normalise)
        pruner, optimizer = attached(layer, NOW)
        for _ in range(3):
            optimizer.zero_grad()
            for seed in range(8):
                backward(layer, seed)
            optimizer.step()
        assert pruner.step_count == 3

    @pytest.mark.parametrize("skipped", [0, 5])
    def test_of_noise_that_is_added_and_taken_back(self, skipped):
        layer, pruner, optimizer = pruned_gru()
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        for step in range(skipped + 3):
            optimizer.zero_grad()
            for _ in range(1 if skipped else 4):
                noise = torch.randn_like(layer.weight_hh_l0) * (layer.weight_hh_l0 != 0)
                layer.weight_hh_l0.detach().add_(noise)
                scaler.scale(layer(torch.randn(4, 3, 5))[0].square().mean()).backward()
                layer.weight_hh_l0.detach().sub_(noise)
            if step < skipped:
                layer.bias_ih_l0.grad[0] = math.inf
            scaler.step(optimizer)
            scaler.update()
        assert pruner.step_count == 3

    def test_of_an_inner_loop_of_another_optimizer(self):
        """As in Reptile: a task trains the weights, and where it led is the gradient of the attached optimizer."""
        layer, pruner, optimizer = pruned_gru()
        for _ in range(3):
            before = copy.deepcopy(layer.state_dict())
            train(layer, torch.optim.SGD(layer.parameters(), lr=0.1), 10)
            after = copy.deepcopy(layer.state_dict())
            layer.load_state_dict(before)
            for name, parameter in layer.named_parameters():
                parameter.grad = before[name] - after[name]
            optimizer.step()
        assert pruner.step_count == 3
        assert masked_everywhere(pruner, optimizer)

    def test_of_many_optimizers_in_each_step(self):
        model = nn.ModuleList([gru(5, 7) for _ in range(7)])
        parts = Several([torch.optim.SGD([weight], lr=0.1) for weight in model.parameters()])
        pruner, _ = attached(model, NOW, parts)
        for _ in range(2):
            for layer in model:
                backward(layer)
            parts.step()
        assert pruner.step_count == 2

    @pytest.mark.parametrize("holds_all", [False, True])
    def test_of_others_that_train_other_weights(self, holds_all):
        layer, head = gru(5, 7), nn.Linear(7, 1)
        pruner, optimizer = attached(layer, NOW)
        others = torch.optim.SGD([*head.parameters(), *(layer.parameters() if holds_all else ())], lr=0.1)
        head.weight.grad = torch.ones_like(head.weight)
        for _ in range(15):
            others.step()
        train(layer, optimizer, 1)
        assert pruner.step_count == 1

    @pytest.mark.parametrize("pattern", [Picks(), Blocks()], ids=str)
    @pytest.mark.parametrize("shape", [(4, 0), (0, 4)])
    def test_of_a_weight_without_elements(self, pattern, shape):
        layer = gru(5, 7)
        layer.none = nn.Parameter(torch.empty(shape))
        with pytest.warns(UserWarning, match="none will be pruned to nothing"):
            pruner, optimizer = attached(layer, NOW, pattern=pattern, include=("none",))
        for _ in range(15):
            layer.none.square().sum().backward()
        train(layer, optimizer, 2)
        assert (pruner.step_count, pruner.sparsities["none"]) == (2, 0)

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
