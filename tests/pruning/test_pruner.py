"""The pruner in training: what is masked and when. Optimizers, checkpoints and ranks have files of their own."""

import copy
import dataclasses
import math

import pytest
import torch
from pruner_training import NOW, attached, backward, gru, masked_everywhere, pruned_gru, train
from torch import nn

from triton_sparse_rnn.pruning import ConstantMask, OneShot, PolynomialDecay, Pruner, Schedule, ThresholdRamp
from triton_sparse_rnn.sparse.blocks import count_blocks, to_blocks
from triton_sparse_rnn.sparse.patterns import Blocks

LAYERS = {
    "rnn": lambda: nn.RNN(5, 7, num_layers=2),
    "gru": lambda: nn.GRU(5, 7, bidirectional=True),
    "lstm": lambda: nn.LSTM(5, 7, proj_size=4),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # true, and no matter here
@pytest.mark.filterwarnings("ignore:.* will be pruned to nothing")  # where one block covers a gate
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("block_size", [(1, 1), (2, 3), (3, 2), (4, 1), (5, 4), (7, 5), (16, 1)])
def test_each_gate_prunes_its_lowest_blocks_at_every_remainder(kind, block_size):
    layer = LAYERS[kind]()
    before = {name: weight.detach().clone() for name, weight in layer.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    pruner, _ = attached(layer, OneShot(sparsity=0.6, step=1), optimizer, pattern=block_size)
    train(layer, optimizer, 1)
    for weight in pruner.weights:
        old, mask = before[weight.name], pruner.masks[weight.name]
        assert torch.equal(weight.parameter, old * mask)
        rows, columns = count_blocks(7, old.shape[1], block_size)
        for gate_weight, gate_mask in zip(old.split(7), mask.split(7), strict=True):
            blocks = to_blocks(gate_mask, block_size).any(-1).any(-1)
            scores = Blocks(*block_size).scores(gate_weight[None], "l2")[0]
            assert (~blocks).sum() == round(0.6 * rows * columns)
            if 0 < blocks.sum() < blocks.numel():
                assert scores[~blocks].max() < scores[blocks].min()
    pruned = sum(int((~mask).sum()) for mask in pruner.masks.values())
    assert pruner.sparsity == pruned / sum(mask.numel() for mask in pruner.masks.values())
    assert pruner.sparsities == {name: (~mask).sum().item() / mask.numel() for name, mask in pruner.masks.items()}
    assert all(
        torch.equal(layer.get_parameter(name), before[name]) for name in before if "bias" in name or "hr" in name
    )


def test_decay_reaches_the_count_of_every_update_and_nothing_grows_back():
    layer = gru(6, 10)
    schedule = PolynomialDecay(final_sparsity=0.87, begin_step=2, end_step=11, frequency=4)
    pruner, optimizer = attached(layer, schedule, pattern=(3, 1))
    masks = []
    train(layer, optimizer, 15, after=lambda: masks.append(pruner.masks["weight_hh_l0"]))
    due = {1: 0, 2: 2, 6: 6, 10: 10, 11: 11}
    for step, mask in enumerate(masks, start=1):
        last = max(due_step for due_step in due if due_step <= step)
        sparsity = schedule.sparsity_at(last) if last > 1 else 0
        blocks = to_blocks(mask.unflatten(0, (3, 10)), (3, 1)).any(-1).any(-1)
        assert (~blocks).sum((-2, -1)).tolist() == [round(sparsity * 40)] * 3
        assert step == 1 or not (mask & ~masks[step - 2]).any()
    assert pruner.finished
    assert masked_everywhere(pruner, optimizer)
    alive = pruner.masks["weight_hh_l0"]
    before = layer.weight_hh_l0.detach().clone()
    train(layer, optimizer, 1)
    assert (layer.weight_hh_l0 != before)[alive].all()  # the rest goes on training


def test_threshold_ramp_is_algorithm_1():
    twin, layer = gru(5, 6), gru(5, 6)
    twin.load_state_dict(layer.state_dict())
    schedule = ThresholdRamp(q=0.3, begin_step=2, ramp_step=6, end_step=14, frequency=3, slope_ratio=2.0)
    pruner, optimizer = attached(layer, schedule, torch.optim.SGD(layer.parameters(), lr=0.5), pattern=(1, 1))
    train(layer, optimizer, 18)

    theta = 0.3 * 3 / (4 + 2.0 * 8)
    weights = {name: weight for name, weight in twin.named_parameters() if "weight" in name}
    masks = {name: torch.ones_like(weight) for name, weight in weights.items()}
    plain = torch.optim.SGD(twin.parameters(), lr=0.5)
    for step in range(1, 19):
        plain.zero_grad()
        backward(twin, seed=step - 1)
        plain.step()
        for name, weight in weights.items():
            weight.data *= masks[name]
            if step in (5, 8, 11, 14):
                eps = theta * (step - 2) / 3 if step < 6 else (theta * 4 + 2.0 * theta * (step - 6)) / 3
                masks[name] = (weight.data.abs() > eps).float()
                weight.data *= masks[name]
    assert 0.1 < pruner.sparsity < 1
    for name, weight in weights.items():
        assert torch.equal(pruner.masks[name], masks[name].bool())
        assert torch.equal(layer.get_parameter(name), weight)


@pytest.mark.parametrize("block_size", [(1, 1), (4, 2)])
def test_tied_gates_share_one_mask(block_size):
    layer = nn.LSTM(5, 7)
    pruner, optimizer = attached(layer, NOW, tie_gates=True, pattern=block_size)
    train(layer, optimizer, 1)
    for mask in pruner.masks.values():
        first, *others = mask.split(7)
        assert all(torch.equal(first, other) for other in others)
    assert masked_everywhere(pruner, optimizer)
    assert pruner.sparsity == pytest.approx(0.5, abs=0.1)


def test_balanced_prunes_unit_groups_alike():
    layer = gru(9, 8)
    with torch.no_grad():
        layer.weight_hh_l0[:2] *= 100
    pruner, optimizer = attached(layer, NOW, balanced=True, pattern=(2, 1))
    train(layer, optimizer, 1)
    assert (~pruner.masks["weight_hh_l0"]).sum(-1).tolist() == [4] * 24
    assert (~pruner.masks["weight_ih_l0"]).sum(-1).tolist() == [4] * 24  # round(4.5) is 4


def test_gates_with_schedules_of_their_own():
    layer = gru(6, 8)
    targets = {"*hh*": {"r": OneShot(sparsity=0.75, step=2), "n": None}}
    pruner, optimizer = attached(layer, NOW, targets=targets, pattern=(4, 1))
    seen = []
    train(
        layer,
        optimizer,
        2,
        lambda: seen.append([(~gate).sum().item() for gate in pruner.masks["weight_hh_l0"].split(8)]),
    )
    assert seen == [[0, 32, 0], [48, 32, 0]]
    assert pruner.finished


def test_included_matrices_are_pruned_flat():
    model = nn.ModuleDict({"rnn": nn.RNN(4, 4), "convolution": nn.Conv1d(4, 6, 3)})
    pruner = Pruner(model, NOW, pattern=(4, 2), include=("*conv*",))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    pruner.step(optimizer)
    kept = to_blocks(pruner.masks["convolution.weight"].flatten(1), (4, 2))
    assert kept.any(-1).any(-1).sum() == 6
    assert not model.get_parameter("convolution.weight")[~pruner.masks["convolution.weight"]].any()


def test_sparse_gradients_are_refused_as_soon_as_they_come():
    model = nn.ModuleDict({"e": nn.Embedding(9, 5, sparse=True), "rnn": nn.GRU(5, 7)})
    pruner = Pruner(model, OneShot(sparsity=0.5, step=1000), include=("e.weight",))
    with pytest.raises(TypeError, match=r"e\.weight must have dense gradients .*sparse_coo: .* sparse=False, or leave"):
        model["rnn"](model["e"](torch.tensor([[1, 2]])))[0].sum().backward()
    assert pruner.step_count == 0


def test_schedule_of_a_user():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Halve(Schedule):
        last_step: int = 3  # pyright: ignore[reportIncompatibleMethodOverride]

        def updates_at(self, step):
            return 1 <= step <= self.last_step

        def sparsity_at(self, step):
            return 1 - 0.5 ** min(step, self.last_step)

    layer = gru(8, 8)
    pruner, optimizer = attached(layer, Halve(), pattern=(1, 1))
    seen = []
    train(layer, optimizer, 4, after=lambda: seen.append(pruner.sparsity))
    assert seen == [0.5, 0.75, 0.875, 0.875]
    assert pruner.finished


def test_nothing_is_touched_before_the_first_update():
    layer, twin = gru(5, 7), gru(5, 7)
    twin.load_state_dict(layer.state_dict())
    pruner, optimizer = attached(layer, OneShot(sparsity=0.5, step=4))
    train(layer, optimizer, 3)
    train(twin, torch.optim.Adam(twin.parameters(), lr=0.02), 3)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), twin.parameters(), strict=True))
    assert (pruner.sparsity, pruner.step_count, pruner.finished) == (0, 3, False)
    assert all(mask.all() for mask in pruner.masks.values())


def test_clipping_sees_masked_gradients():
    layer, pruner, optimizer = pruned_gru(1)
    twin = copy.deepcopy(layer)
    optimizer.zero_grad()
    backward(layer)
    backward(twin)
    whole = nn.utils.get_total_norm([parameter.grad for parameter in twin.parameters()])
    for name, mask in pruner.masks.items():
        twin.get_parameter(name).grad *= mask
    expected = nn.utils.get_total_norm([parameter.grad for parameter in twin.parameters()])
    norm = nn.utils.clip_grad_norm_(layer.parameters(), 1e-3)
    assert norm == expected < whole


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_overflow_in_pruned_gradients_vanishes(value):
    layer, pruner, optimizer = pruned_gru(1)
    mask = pruner.masks["weight_hh_l0"]
    layer.weight_hh_l0.register_hook(lambda gradient: gradient.masked_fill(~mask, value))
    optimizer.zero_grad()
    backward(layer)
    assert nn.utils.clip_grad_norm_(layer.parameters(), 1.0, error_if_nonfinite=True).isfinite()
    optimizer.step()
    assert masked_everywhere(pruner, optimizer)


def test_gradients_accumulated_over_several_calls_are_masked():
    layer, pruner, optimizer = pruned_gru(1)
    twin = copy.deepcopy(layer)
    optimizer.zero_grad()
    for seed in range(3):
        backward(layer, seed)
        backward(twin, seed)
        assert masked_everywhere(pruner)
    assert pruner.step_count == 1
    for name, mask in pruner.masks.items():
        assert torch.equal(layer.get_parameter(name).grad, twin.get_parameter(name).grad * mask)


def test_gradient_set_by_hand_does_no_harm():
    layer, pruner, optimizer = pruned_gru(1)
    layer.weight_hh_l0.grad = torch.full_like(layer.weight_hh_l0, math.nan).where(~pruner.masks["weight_hh_l0"], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    backward(layer)
    assert masked_everywhere(pruner, optimizer)


@pytest.mark.parametrize("score", ["max", "mean", "l2"])
def test_nan_weights_are_kept_and_crash_nothing(score):
    layer = gru(5, 7)
    with torch.no_grad():
        layer.weight_hh_l0[3, 4] = math.nan
    schedule = PolynomialDecay(final_sparsity=0.9, begin_step=0, end_step=1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    pruner, _ = attached(layer, schedule, optimizer, pattern=(2, 2), score=score)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert pruner.masks["weight_hh_l0"][2:4, 4:6].all()
    assert layer.weight_hh_l0.isnan().sum() == 1
    assert not layer.weight_ih_l0.isnan().any()


def test_schedule_that_begins_at_step_zero_prunes_with_the_first_step():
    layer = gru(8, 8)
    schedule = PolynomialDecay(initial_sparsity=0.5, final_sparsity=0.75, begin_step=0, end_step=100)
    pruner, optimizer = attached(layer, schedule, pattern=(1, 1))
    before = layer.weight_hh_l0.detach().clone()
    backward(layer)
    assert torch.equal(layer.weight_hh_l0, before)  # a backward pass never writes weights
    assert pruner.sparsity == 0.5
    optimizer.step()
    assert masked_everywhere(pruner, optimizer)


@pytest.mark.parametrize("when", ["before", "after"])
def test_constant_mask_keeps_the_zeros_of_a_checkpoint(when):
    trained = gru(6, 8)
    source, optimizer = attached(trained, OneShot(sparsity=0.7, step=1), pattern=(4, 1))
    train(trained, optimizer, 2)
    layer = gru(6, 8)
    if when == "before":
        layer.load_state_dict(trained.state_dict())
    pruner, optimizer = attached(layer, ConstantMask(), pattern=(4, 1))
    if when == "after":
        layer.load_state_dict(trained.state_dict())
    train(layer, optimizer, 3)
    assert all(torch.equal(mask, source.masks[name]) for name, mask in pruner.masks.items())
    assert masked_everywhere(pruner, optimizer)
    assert pruner.finished


def test_constant_mask_of_a_dense_model_is_an_error():
    layer = gru(6, 8)
    pruner = Pruner(layer, ConstantMask())
    for _ in range(2):
        with pytest.raises(
            ValueError, match="ConstantMask found no picked unit of 16x1 in 32 that is all zeros in weight_ih_l0, we"
        ):
            backward(layer)
    assert not pruner.finished


def test_blocks_far_beyond_a_weight_are_refused_at_once():
    message = r"pattern must be at most \(4096, 4096\) for each gate of weight_ih_l0 of 7 x 5, got \(1000000000, 1\)"
    with pytest.raises(ValueError, match=message):
        Pruner(nn.GRU(5, 7), OneShot(sparsity=0.5, step=1), pattern=(10**9, 1))
    Pruner(nn.GRU(5, 7), OneShot(sparsity=0.5, step=1), pattern=(1, 1000), targets={"*_ih_*": None}, score="max")
