"""Who else writes: pruned weights that are not zero, and trainings in which the attached optimizer does not step."""

import copy
import gc
from typing import Any

import optimizer_stand_ins
import pruner_training
import pytest
import torch
from optimizer_stand_ins import (
    Average,
    HookedLookahead,
    Lookahead,
    SamAlone,
    SteppingBySuper,
)
from pruner_training import NOW, attached, backward, gru, masked_everywhere, pruned_gru, train, zeros_hold

from triton_sparse_rnn.pruning import OneShot, PolynomialDecay, Pruner
from triton_sparse_rnn.pruning.watch import PrunedSamples

BEHIND = (
    r"pruned weights of weight_ih_l0, weight_hh_l0 were written to since the step of Adam .*pruner\.attach\(lookahead"
)
NO_STEP = r"of class SGD, made 11 steps for weight_ih_l0, weight_hh_l0, and the Adam .* no step meanwhile.*attach\(that"
NEVER = r"weight_[ih]h_l0 has changed before 12 backward passes, but the {} .* no step so far, .*pruner\.step\(opt"


@pytest.mark.parametrize("wrapper", [Lookahead, HookedLookahead])
def test_a_wrapper_around_the_attached_optimizer_is_found_out(wrapper):
    layer, pruner, optimizer = pruned_gru()
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
    layer, pruner, optimizer = pruned_gru()
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
    layer, pruner, optimizer = pruned_gru(2)
    with torch.no_grad():
        layer.weight_hh_l0.add_(1)
    with pytest.warns(UserWarning, match="pruned weights of weight_hh_l0 were"):
        train(layer, optimizer, 1)
    assert zeros_hold(pruner)


def test_a_state_is_not_saved_beside_weights_that_came_back():
    layer, pruner, optimizer = pruned_gru()
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
    pruner, optimizer = attached(layer, OneShot(sparsity=0.6, step=1), pattern=block_size, tie_gates=tie_gates)
    train(layer, optimizer, 1)
    for weight in pruner.weights:
        places = pruner._masks.samples._places[weight.name]
        blocks = int((~weight.every_gate(pruner._masks.of_units[weight.name])).sum())
        assert len(places.unique()) == len(places) == min(PrunedSamples.PLACES, blocks)
        assert not pruner.masks[weight.name].flatten()[places].any()
        assert {int(place) // (13 * weight.parameter.shape[1]) for place in places} == {0, 1, 2}


@pytest.fixture
def _another_device(monkeypatch):
    """Samples are looked at as those on a GPU, whose tensors say "cuda"."""
    monkeypatch.setattr(PrunedSamples, "_answers_at_once", lambda samples, parameter: False)


@pytest.mark.usefixtures("_another_device")
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0"])
def test_every_weight_on_another_device_is_read_when_steps_are_made_by_hand(name):
    layer = gru(5, 7)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    pruner = Pruner(layer, NOW)
    train(layer, optimizer, 2, after=lambda: pruner.step(optimizer))
    with torch.no_grad():
        layer.get_parameter(name).add_(1)
    with pytest.warns(UserWarning, match=f"pruned weights of {name} were written to since pruner.step"):
        train(layer, optimizer, PrunedSamples.PERIOD, after=lambda: pruner.step(optimizer))


@pytest.mark.usefixtures("_another_device")
@pytest.mark.parametrize("end", ["many steps", "remove"])
def test_what_was_seen_on_another_device_is_read_though_masks_change(end):
    layer = gru(5, 7)
    schedule = PolynomialDecay(initial_sparsity=0.3, final_sparsity=0.8, begin_step=0, end_step=70, frequency=1)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    pruner = Pruner(layer, schedule, pattern=(2, 1))
    handle = pruner.attach(optimizer)
    train(layer, optimizer, 2)
    with torch.no_grad():
        layer.weight_hh_l0.add_(1)
    if end == "remove":
        train(layer, optimizer, 2)
    with pytest.warns(UserWarning, match="pruned weights of weight_hh_l0 were written to since the step of Adam"):
        handle.remove() if end == "remove" else train(layer, optimizer, PrunedSamples.PERIOD)
    handle.remove()  # says nothing more
    assert pruner._attachment is None


@pytest.mark.usefixtures("_another_device")
def test_samples_do_not_wait_for_another_device_at_every_look():
    layer, pruner, _optimizer = pruned_gru(1)
    samples = pruner._masks.samples
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
        train(layer, other, 30)
    assert len(caught) == 1  # said once
    assert caught[0].filename == pruner_training.__file__  # where the other is called
    assert (pruner.step_count, pruner.sparsity) == (1, 0)


@pytest.mark.parametrize(
    ("kind", "variant", "steps_before"),
    [(torch.optim.SGD, {}, 0), (torch.optim.SGD, {"fused": True}, 3), (torch.optim.AdamW, {"foreach": True}, 3)],
)
def test_another_is_counted_whatever_it_does_to_versions(kind, variant, steps_before):
    layer = gru(5, 7)
    train(layer, attached(layer, NOW)[1], steps_before)
    gc.collect()  # the attached one is gone, and its pruner with it unless somebody holds them
    pruner, optimizer = attached(layer, NOW)
    train(layer, optimizer, steps_before)
    other = kind(layer.parameters(), lr=0.01, **variant)
    train(layer, other, 10)
    with pytest.warns(UserWarning, match=f"of class {kind.__name__}, made 11 steps for .* Adam"):
        train(layer, other, 1)
    assert pruner.step_count == steps_before


def test_another_that_is_seen_by_a_call_of_its_super_class_is_counted_once():
    layer, pruner, _ = pruned_gru()
    other = SteppingBySuper(layer.parameters(), lr=0.01)
    train(layer, other, 10)
    with pytest.warns(UserWarning, match="of class SteppingBySuper, made 11 steps"):
        train(layer, other, 1)
    assert pruner.step_count == 0


def test_an_optimizer_that_never_calls_step_is_noticed_though_versions_do_not_move():
    layer = gru(5, 7)
    sam = SamAlone(layer.parameters())
    pruner = Pruner(layer, NOW)
    handle = pruner.attach(sam)

    def train_by_it(steps):
        for seed in range(steps):
            for step in (sam.first_step, sam.second_step):
                sam.zero_grad()
                backward(layer, seed)
                step()

    with pytest.warns(UserWarning, match=NEVER.format("SamAlone")) as caught:
        train_by_it(9)
    assert len(caught) == 1
    assert pruner.step_count == 0
    handle.remove()
    for step in range(3):  # as the warning says
        train_by_it(1)
        pruner.step(sam)
        assert pruner.step_count == step + 1
    assert zeros_hold(pruner)


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
    with pytest.warns(UserWarning, match=NEVER.format("Adam")):
        train(layer, optimizer, 14)


def test_an_exception_in_a_step_leaves_the_watch_awake():
    layer = gru(5, 7)
    optimizer = attached(layer, NOW)[1]

    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(fails)
    with pytest.warns(UserWarning, match=NO_STEP):
        train(layer, torch.optim.SGD(layer.parameters(), lr=0.1), 11)
