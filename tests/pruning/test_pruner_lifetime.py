"""The pruner around training: attached or stepped by hand, let go, and models that change under it."""

import copy
import gc
import pickle

import pytest
import torch
from pruner_training import NOW, attached, backward, gru, masked_everywhere, pruned_gru, train
from torch import nn

from triton_sparse_rnn.pruning import OneShot, PolynomialDecay, Pruner


def test_step_by_hand_equals_attached():
    by_hand, layer = gru(5, 7), gru(5, 7)
    by_hand.load_state_dict(layer.state_dict())
    schedule = PolynomialDecay(final_sparsity=0.8, begin_step=1, end_step=5, frequency=1)
    _, optimizer = attached(layer, schedule)
    train(layer, optimizer, 8)
    pruner, optimizer = Pruner(by_hand, schedule), torch.optim.Adam(by_hand.parameters(), lr=0.02)
    train(by_hand, optimizer, 8, after=lambda: pruner.step(optimizer))
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), by_hand.parameters(), strict=True))
    assert masked_everywhere(pruner, optimizer)


def test_attaching_is_exclusive_and_ends_with_its_handle():
    layer = gru(5, 7)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    pruner = Pruner(layer, NOW)
    with pruner.attach(optimizer):
        with pytest.raises(RuntimeError, match=r"attached already: call remove\(\)"):
            pruner.attach(torch.optim.SGD(layer.parameters()))
        with pytest.raises(RuntimeError, match=r"do not call pruner\.step\(\)"):
            pruner.step(optimizer)
        train(layer, optimizer, 2)
    assert masked_everywhere(pruner)
    train(layer, optimizer, 1)
    assert pruner.step_count == 2
    assert all(layer.get_parameter(name)[~mask].any() for name, mask in pruner.masks.items())
    handle = pruner.attach(optimizer)
    train(layer, optimizer, 1)
    assert masked_everywhere(pruner, optimizer)
    handle.remove()
    handle.remove()
    pruner.attach(torch.optim.SGD(layer.parameters(), lr=0.1))


def test_old_handle_leaves_a_new_attachment_alone():
    layer = gru(5, 7)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    pruner = Pruner(layer, NOW)
    first = pruner.attach(optimizer)
    first.remove()
    pruner.attach(optimizer)
    first.remove()
    train(layer, optimizer, 2)
    assert masked_everywhere(pruner, optimizer)


def test_optimizer_must_hold_every_pruned_weight():
    layer = gru(5, 7)
    pruner = Pruner(layer, NOW)
    half = torch.optim.SGD([layer.weight_ih_l0], lr=0.1)
    for call in (pruner.attach, pruner.step):
        with pytest.raises(ValueError, match=r"optimizer lacks weight_hh_l0: .* targets=\{'weight_hh_l0': None\}"):
            call(half)
        with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got GRU"):
            call(layer)
    assert pruner.step_count == 0


def replace_by_assignment(layer):
    layer.load_state_dict({name: tensor.clone() for name, tensor in layer.state_dict().items()}, assign=True)


def replace_by_setattr(layer):
    layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.detach().clone())


def replace_by_parametrization(layer):
    nn.utils.parametrize.register_parametrization(layer, "weight_hh_l0", nn.Identity())


@pytest.mark.parametrize("replace", [replace_by_assignment, replace_by_setattr, replace_by_parametrization])
def test_replaced_parameters_are_noticed(replace):
    model = nn.Sequential(gru(5, 7))
    _, optimizer = attached(model, NOW, torch.optim.Adam(model.parameters()))
    train(model[0], optimizer, 1)
    replace(model[0])
    with pytest.raises(RuntimeError, match=r"no longer has the parameters .*0\.weight_hh_l0.*Make the pruner after"):
        train(model[0], optimizer, 1)


def test_replaced_module_is_noticed():
    model = nn.Sequential(gru(5, 7))
    _, optimizer = attached(model, NOW, torch.optim.Adam(model.parameters()))
    model[0] = gru(5, 7)
    with pytest.raises(RuntimeError, match="no longer has the parameters"):
        optimizer.step()


def test_model_may_change_its_dtype():
    layer = gru(5, 7)
    pruner, optimizer = attached(layer, NOW, torch.optim.SGD(layer.parameters(), lr=0.1))
    train(layer, optimizer, 1)
    layer.double()
    optimizer.zero_grad()
    layer(torch.randn(4, 3, 5, dtype=torch.float64))[0].sum().backward()
    optimizer.step()
    assert masked_everywhere(pruner, optimizer)


def test_state_dict_of_the_model_stays_plain():
    layer = gru(5, 7)
    keys = list(layer.state_dict())
    _, optimizer = attached(layer, NOW)
    train(layer, optimizer, 2)
    assert list(layer.state_dict()) == keys
    dense = gru(5, 7)
    dense.load_state_dict(layer.state_dict(), strict=True)


def test_pruned_model_can_be_copied_and_pickled():
    layer, _, optimizer = pruned_gru()
    train(layer, optimizer, 1)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), other.parameters(), strict=True))
        backward(other)
        assert (other.weight_hh_l0.grad[other.weight_hh_l0 == 0] != 0).any()  # copies are free of the pruner


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("attach", [False, True])
def test_copies_of_a_pruner_are_refused(duplicate, attach):
    layer = gru(5, 7)
    pruner = Pruner(layer, NOW)
    if attach:
        pruner.attach(torch.optim.Adam(layer.parameters()))
    with pytest.raises(TypeError, match=r"cannot be copied or pickled, .* state_dict\(\) by load_state_dict\(\)"):
        duplicate(pruner)


def test_copied_model_goes_on_with_the_state_of_the_pruner():
    layer = gru(5, 7)
    schedule = PolynomialDecay(final_sparsity=0.8, begin_step=1, end_step=5, frequency=1)
    pruner, optimizer = attached(layer, schedule, torch.optim.SGD(layer.parameters(), lr=0.1))
    train(layer, optimizer, 3)
    other = copy.deepcopy(layer)
    heir, others = attached(other, schedule, torch.optim.SGD(other.parameters(), lr=0.1))
    heir.load_state_dict(pruner.state_dict())
    for model, each in ((layer, optimizer), (other, others)):
        train(model, each, 3)
    assert masked_everywhere(heir, others)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), other.parameters(), strict=True))


def test_pruner_that_is_dropped_has_no_effect_unless_attached():
    layer = gru(5, 7)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    pruner = Pruner(layer, NOW)
    train(layer, optimizer, 1)
    pruner.step(optimizer)
    del pruner
    gc.collect()
    backward(layer)
    assert (layer.weight_hh_l0.grad[layer.weight_hh_l0 == 0] != 0).any()
    Pruner(layer, NOW).attach(optimizer)
    gc.collect()
    train(layer, optimizer, 1)
    optimizer.zero_grad()
    backward(layer)
    assert not layer.weight_hh_l0.grad[layer.weight_hh_l0 == 0].any()


def test_masks_are_copies():
    _layer, pruner, optimizer = pruned_gru(1)
    for mask in pruner.masks.values():
        mask.fill_(True)
    assert masked_everywhere(pruner, optimizer)


def test_repr_says_how_far_it_is():
    layer = gru(4, 16)
    pruner, optimizer = attached(layer, OneShot(sparsity=0.5, step=2))
    begin = "Pruner(2 weights, pattern=Picks(rows=16, bank=32, columns=1), score='l2', step"
    assert repr(pruner) == f"{begin} 0, 0.0 % sparse)"
    train(layer, optimizer, 2)
    assert repr(pruner) == f"{begin} 2, 50.0 % sparse, finished)"
