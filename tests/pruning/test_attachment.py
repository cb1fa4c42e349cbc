"""Optimizers in each other: which one counts, what the outer ones write, and hooks where none can be registered."""

import copy
import functools
import math
from typing import Any

import pytest
import torch
from optimizer_stand_ins import HookedLookahead, Lookahead, Plain, Sam, Several, SteppingBySuper, Switching
from pruner_training import NOW, backward, gru, masked_everywhere, train, zero_half, zeros_hold

from triton_sparse_rnn.pruning import ConstantMask, OneShot, PolynomialDecay, Pruner
from triton_sparse_rnn.pruning.optimizers import find_counting

DECAY = PolynomialDecay(initial_sparsity=0.3, final_sparsity=0.8, begin_step=0, end_step=6, frequency=2)


def adam(layer):
    return torch.optim.Adam(layer.parameters(), lr=0.02)


def sam_step(layer, sam, seed=0):
    """One step as its users write it."""
    sam.zero_grad()
    backward(layer, seed)
    sam.first_step()
    sam.zero_grad()
    backward(layer, seed)
    sam.second_step()


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_two_calls_of_a_sharpness_aware_optimizer_are_one_step(inside, base):
    layer = gru(5, 7)
    sam = Sam(layer.parameters(), base, lr=0.02)
    pruner = Pruner(layer, DECAY, pattern=(2, 1))
    pruner.attach(sam.base_optimizer if inside else sam)
    for step in range(8):
        sam_step(layer, sam, seed=step)
        assert pruner.step_count == step + 1
        assert masked_everywhere(pruner, sam.base_optimizer)
    assert pruner.finished


def test_a_closure_of_a_sharpness_aware_optimizer_is_one_step():
    layer = gru(5, 7)
    sam = Sam(layer.parameters(), lr=0.02)
    pruner = Pruner(layer, DECAY, pattern=(2, 1))
    pruner.attach(sam)
    for step in range(8):
        sam.zero_grad()
        backward(layer, step)
        sam.step(lambda step=step: backward(layer, step))
        assert pruner.step_count == step + 1
        assert masked_everywhere(pruner, sam)  # and what it went back to


@pytest.mark.parametrize("wrapper", [Lookahead, HookedLookahead])
def test_no_weight_comes_back_when_slow_weights_do(wrapper):
    layer = gru(5, 7)
    lookahead = wrapper(adam(layer), k=3)
    pruner = Pruner(layer, DECAY, pattern=(2, 1))
    pruner.attach(lookahead)
    train(layer, lookahead, 10, after=lambda: zeros_hold(pruner) or pytest.fail("a pruned weight is not zero"))
    assert pruner.step_count == 10
    assert masked_everywhere(pruner, lookahead.optimizer)
    if wrapper is HookedLookahead:
        assert masked_everywhere(pruner, lookahead)


def test_wrappers_in_wrappers_count_each_step_once():
    layer = gru(5, 7)
    inner = adam(layer)
    outer: Any = Plain(HookedLookahead(Lookahead(inner, k=2), k=5))
    pruner = Pruner(layer, DECAY, pattern=(2, 1))
    with pruner.attach(outer):
        train(layer, outer, 10, after=lambda: zeros_hold(pruner) or pytest.fail("a pruned weight is not zero"))
        assert pruner.step_count == 10
    assert "step" not in vars(outer)
    train(layer, outer, 1)
    assert pruner.step_count == 10


def test_weights_shared_out_to_several_optimizers_are_counted_outside_and_masked_inside():
    layer = gru(5, 7)
    parts = [
        torch.optim.Adam([layer.weight_ih_l0, layer.bias_ih_l0], lr=0.02),
        torch.optim.SGD([layer.weight_hh_l0, layer.bias_hh_l0], lr=0.02, momentum=0.9),
    ]
    both = Several(parts)
    pruner = Pruner(layer, DECAY, pattern=(2, 1))
    pruner.attach(both)
    for step in range(8):
        layer.zero_grad()
        backward(layer, step)
        both.step()
        assert pruner.step_count == step + 1
    assert masked_everywhere(pruner)
    assert not parts[0].state[layer.weight_ih_l0]["exp_avg"][~pruner.masks["weight_ih_l0"]].any()
    assert not parts[1].state[layer.weight_hh_l0]["momentum_buffer"][~pruner.masks["weight_hh_l0"]].any()


def test_a_step_by_hand_masks_what_the_optimizers_inside_remember():
    layer = gru(5, 7)
    lookahead = Lookahead(adam(layer), k=3)
    pruner = Pruner(layer, DECAY, pattern=(2, 1))
    train(layer, lookahead, 8, after=lambda: pruner.step(lookahead))
    assert pruner.step_count == 8
    assert masked_everywhere(pruner, lookahead.optimizer)


def test_a_step_that_was_replaced_in_the_object_is_followed():
    layer = gru(5, 7)
    optimizer: Any = torch.optim.SGD(layer.parameters(), lr=0.1)

    def own_step():
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter -= 0.1 * parameter.grad

    optimizer.step = own_step
    pruner = Pruner(layer, NOW)
    handle = pruner.attach(optimizer)
    train(layer, optimizer, 3)
    assert pruner.step_count == 3
    assert masked_everywhere(pruner)
    handle.remove()
    assert optimizer.step is own_step


@pytest.mark.parametrize("wrapper", [Lookahead, lambda optimizer: optimizer])
@pytest.mark.parametrize("first", ["scheduler", "pruner"])
def test_learning_rate_schedulers_wrap_it_and_are_wrapped(first, wrapper):
    layer = gru(5, 7)
    optimizer = wrapper(adam(layer))
    pruner = Pruner(layer, NOW)
    if first == "pruner":
        pruner.attach(optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    if first == "scheduler":
        pruner.attach(optimizer)
    train(layer, optimizer, 3, after=scheduler.step)  # it warns if it finds that step was exchanged
    assert pruner.step_count == 3
    assert zeros_hold(pruner)


def test_a_copied_wrapper_steps_its_own_weights_and_no_pruner():
    layer = gru(5, 7)
    wrapper: Any = Plain(adam(layer))
    pruner = Pruner(layer, NOW)
    pruner.attach(wrapper)
    train(layer, wrapper, 1)
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    copied = copy.deepcopy(wrapper)
    parameters = [parameter for group in copied.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    copied.step()
    assert pruner.step_count == 1
    assert all(map(torch.equal, layer.parameters(), before))
    assert not any(map(torch.equal, parameters, before))


@pytest.mark.parametrize("kind", [functools.partial(torch.optim.SGD, momentum=0.9), SteppingBySuper])
@pytest.mark.parametrize("how", ["step", "function"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.* is deprecated")  # what torch.compile imports
def test_a_compiled_step_counts_without_being_compiled_anew(how, kind):
    layer = gru(5, 7)
    torch.optim.Adam(gru(2, 3).parameters())  # from now on Adam.step calls hooks, too
    optimizer = kind(layer.parameters(), lr=0.02)
    pruner = Pruner(layer, DECAY, pattern=(2, 1))
    pruner.attach(optimizer)
    torch._dynamo.reset()
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    if how == "step":
        optimizer.step = torch.compile(optimizer.step, backend=backend)
        step = lambda: optimizer.step()  # noqa: E731
    else:
        step = torch.compile(lambda: optimizer.step(), backend=backend)
    compiled = []
    for seed in range(12):
        layer.zero_grad(set_to_none=False)
        backward(layer, seed)
        step()
        compiled.append(len(graphs))
        assert pruner.step_count == seed + 1
    assert masked_everywhere(pruner, optimizer)
    assert compiled[2] == compiled[-1] > 0


@pytest.mark.parametrize("wrapper", [Lookahead, HookedLookahead, Plain])
def test_steps_that_a_scaler_skips_do_not_count_in_a_wrapper(wrapper):
    layer = gru(5, 7)
    optimizer = wrapper(adam(layer))
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    pruner = Pruner(layer, NOW)
    pruner.attach(optimizer)
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(layer(torch.randn(4, 3, 5))[0].square().mean()).backward()
        if step % 2:
            layer.bias_ih_l0.grad[0] = math.inf
        scaler.step(optimizer)
        scaler.update()
    assert pruner.step_count == 3
    assert zeros_hold(pruner)


def test_objects_that_are_no_optimizers_are_refused():
    layer = gru(5, 7)
    pruner = Pruner(layer, NOW)
    scheduler = torch.optim.lr_scheduler.StepLR(adam(layer), 1)
    things: Any = (scheduler, layer, torch.optim.Adam)
    for thing in things:
        with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got "):
            pruner.attach(thing)


@pytest.mark.parametrize("attach_to", [lambda optimizer: optimizer, Lookahead, HookedLookahead])
def test_a_step_that_calls_that_of_its_super_class_is_one(attach_to):
    layer = gru(5, 7)
    optimizer = SteppingBySuper(layer.parameters(), lr=0.02)
    torch.optim.Adam(gru(2, 3).parameters())  # from now on Adam.step calls hooks, too
    outer = attach_to(optimizer)
    pruner = Pruner(layer, DECAY, pattern=(2, 1))
    pruner.attach(outer)
    for step in range(8):
        train(layer, outer, 1)
        assert pruner.step_count == step + 1
        assert masked_everywhere(pruner, optimizer)
        optimizer.fails = True
        with pytest.raises(ZeroDivisionError):
            outer.step()
        optimizer.fails = False


@pytest.mark.parametrize(
    "turns",
    [
        lambda step, first, second: [first if step < 7 else second],
        lambda step, first, second: [(first, second)[step % 2]],
        lambda step, first, second: [first, second],
    ],
    ids=["switch", "alternate", "both"],
)
@pytest.mark.parametrize(
    "wrap", [lambda optimizer: optimizer, Lookahead, lambda optimizer: Plain(Lookahead(optimizer))]
)
def test_a_wrapper_of_two_optimizers_with_the_same_weights_counts_its_own_steps(wrap, turns):
    layer = gru(5, 7)
    switching = Switching(layer.parameters(), turns)
    optimizer = wrap(switching)
    pruner = Pruner(layer, DECAY, pattern=(2, 1))
    pruner.attach(optimizer)
    for step in range(20):
        train(layer, optimizer, 1)
        assert pruner.step_count == step + 1
        assert zeros_hold(pruner)
    assert masked_everywhere(pruner, switching.first)
    assert masked_everywhere(pruner, switching.second)


def test_an_optimizer_that_is_kept_twice_or_knows_what_is_around_it_counts():
    layer = gru(5, 7)
    inner: Any = adam(layer)
    outer: Any = Lookahead(Lookahead(inner))
    outer.base = inner
    inner.wrapper = outer
    counting, around = find_counting(outer, {id(layer.weight_hh_l0)})
    assert counting is inner
    assert around[0] is outer
    assert around[1] is outer.optimizer


@pytest.mark.parametrize("set_by_hand", ["weight_ih_l0", "weight_hh_l0", "both"])
@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, Lookahead, HookedLookahead])
def test_constant_mask_is_read_before_a_step_with_gradients_set_by_hand(set_by_hand, wrap):
    layer = zero_half(gru(6, 8))
    before = {name: weight != 0 for name, weight in layer.named_parameters() if "weight" in name}
    optimizer = wrap(torch.optim.SGD(layer.parameters(), lr=0.1))
    pruner = Pruner(layer, ConstantMask(), pattern=(4, 1))
    pruner.attach(optimizer)
    for _ in range(2):
        for name in before:
            if set_by_hand in (name, "both"):
                weight = layer.get_parameter(name)
                (weight.grad,) = torch.autograd.grad(layer(torch.ones(3, 2, 6))[0].sum(), [weight])
        optimizer.step()
        for name, mask in before.items():
            assert torch.equal(pruner.masks[name], mask)
            assert not layer.get_parameter(name)[~mask].any()


def test_constant_mask_that_would_be_read_too_late_is_refused_in_a_step_by_hand():
    layer = zero_half(gru(6, 8))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    pruner = Pruner(layer, ConstantMask(), pattern=(4, 1))
    (layer.weight_hh_l0.grad,) = torch.autograd.grad(layer(torch.ones(3, 2, 6))[0].sum(), [layer.weight_hh_l0])
    optimizer.step()
    with pytest.raises(
        RuntimeError, match=r"ConstantMask did not see the zeros of weight_ih_l0, weight_hh_l0 .*attach"
    ):
        pruner.step(optimizer)
    assert (pruner.step_count, pruner.finished) == (0, False)
    free = Pruner(layer, OneShot(sparsity=0.5, step=1))
    free.step(optimizer)  # nothing to lose
    assert free.step_count == 1


def test_constant_mask_names_each_weight_that_is_dense():
    layer = gru(6, 8)
    with torch.no_grad():
        layer.weight_hh_l0.view(3, 2, 4, 8)[:, 0, :, ::2] = 0
    pruner = Pruner(layer, ConstantMask(), pattern=(4, 1))
    with pytest.warns(
        UserWarning, match=r"no block of 4x1 that is all zeros in weight_ih_l0: .* targets=\{'weight_ih_l0': None"
    ):
        backward(layer)
    backward(layer)  # said once
    assert pruner.sparsities["weight_hh_l0"] == 0.25
    assert pruner.sparsities["weight_ih_l0"] == 0
    meant = Pruner(layer, ConstantMask(), pattern=(4, 1), targets={"weight_ih_l0": None})
    backward(layer)
    assert meant.sparsity == 0.25


def test_constant_mask_looks_only_at_the_gates_it_was_given():
    layer = gru(6, 8)
    targets = {"*hh*": {"r": ConstantMask(), "z": PolynomialDecay(final_sparsity=0.5, begin_step=0, end_step=4)}}
    pruner = Pruner(layer, None, pattern=(4, 1), targets=targets)
    with pytest.raises(ValueError, match="ConstantMask found no block of 4x1 that is all zeros in weight_hh_l0: load"):
        backward(layer)
    assert pruner.step_count == 0
