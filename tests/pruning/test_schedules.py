import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from triton_sparse_rnn.pruning import ConstantMask, OneShot, PolynomialDecay, ThresholdRamp
from triton_sparse_rnn.sparse.patterns import Blocks

DECAY: dict[str, Any] = {"final_sparsity": 0.9, "begin_step": 10, "end_step": 60}
SPAN: dict[str, Any] = {"begin_step": 1, "ramp_step": 2, "end_step": 3}
RAMP: dict[str, Any] = {"q": 0.3, "begin_step": 10, "ramp_step": 30, "end_step": 60}


def updates(schedule, stop=1000):
    return [step for step in range(stop) if schedule.updates_at(step)]


@pytest.mark.parametrize("power", [1, 3, 2.5])
def test_decay_is_the_papers_equation(power):
    schedule = PolynomialDecay(**DECAY, initial_sparsity=0.2, frequency=10, power=power)
    for step in (10, 20, 30, 40, 50, 60):
        expected = 0.9 + (0.2 - 0.9) * (1 - (step - 10) / (5 * 10)) ** power
        assert schedule.sparsity_at(step) == pytest.approx(expected)
    assert schedule.sparsity_at(60) == schedule.sparsity_at(10_000) == 0.9
    assert schedule.sparsity_at(0) == pytest.approx(0.2)
    assert schedule.threshold_at(30) is None


@pytest.mark.parametrize(
    ("frequency", "expected"), [(10, [10, 20, 30, 40, 50, 60]), (20, [10, 30, 50, 60]), (999, [10, 60])]
)
def test_decay_updates_at_both_ends(frequency, expected):
    schedule = PolynomialDecay(**DECAY, frequency=frequency)
    assert updates(schedule) == expected
    assert schedule.last_step == 60


def test_ramp_is_equation_1_at_slope_ratio_one_and_a_half():
    start, ramp, end, freq, q = 1_234, 5_678, 11_111, 100, 0.0837
    schedule = ThresholdRamp(q=q, begin_step=start, ramp_step=ramp, end_step=end, frequency=freq)
    assert schedule.theta == pytest.approx(2 * q * freq / (2 * (ramp - start) + 3 * (end - ramp)))
    assert schedule.phi == pytest.approx(1.5 * schedule.theta)
    before, after = schedule.threshold_at(start + 4 * freq), schedule.threshold_at(ramp + 7 * freq)
    assert before == pytest.approx(4 * schedule.theta)
    assert after == pytest.approx((schedule.theta * (ramp - start) + 7 * freq * schedule.phi) / freq)
    assert schedule.sparsity_at(end) is None


@pytest.mark.parametrize("ramp_step", [10, 11, 30, 59, 60])
@pytest.mark.parametrize("slope_ratio", [0.3, 1.0, 1.5, 2.0])
def test_ramp_rises_to_exactly_q(ramp_step, slope_ratio):
    schedule = ThresholdRamp(**RAMP | {"ramp_step": ramp_step}, frequency=7, slope_ratio=slope_ratio)
    thresholds = [schedule.threshold_at(step) for step in range(80)]
    assert thresholds == sorted(thresholds)
    assert thresholds[10] == 0
    assert thresholds[60] == thresholds[79] == 0.3
    assert updates(schedule) == [17, 24, 31, 38, 45, 52, 59, 60]  # not at begin_step, where the threshold is zero


@pytest.mark.parametrize("total", [2, 3, 7, 39, 40, 41, 500, 4_001, 1_000_000])
def test_steps_from_the_length_of_a_training(total):
    decay, ramp = PolynomialDecay.for_training(total, 0.8), ThresholdRamp.for_training(total, q=0.3)
    assert decay.final_sparsity == 0.8
    assert ramp.q == 0.3
    assert (decay.begin_step, decay.end_step, decay.frequency) == (ramp.begin_step, ramp.end_step, ramp.frequency)
    assert decay.begin_step == total // 20
    assert decay.end_step == total // 2
    assert ramp.ramp_step == total // 4
    if total >= 40:
        assert len(updates(decay, total)) >= 18 or decay.frequency == 100
    assert decay.frequency <= 100


def test_steps_that_are_given_are_kept():
    decay = PolynomialDecay.for_training(1_000, begin_step=600, frequency=7, power=1)
    assert (decay.begin_step, decay.end_step, decay.frequency, decay.power) == (600, 601, 7, 1)
    ramp = ThresholdRamp.for_training(1_000, 0.2, begin_step=300, end_step=900, slope_ratio=2)
    assert (ramp.begin_step, ramp.ramp_step, ramp.end_step, ramp.slope_ratio) == (300, 300, 900, 2)
    drawn = ThresholdRamp.from_weights(nn.GRU(4, 8), total_steps=1_000, ramp_step=400)
    assert (drawn.begin_step, drawn.ramp_step, drawn.end_step) == (50, 400, 500)


@pytest.mark.parametrize(
    ("total", "others", "error", "message"),
    [
        (1, {}, ValueError, "total_steps must be at least 2, got 1"),
        (99.0, {}, TypeError, r"total_steps must be an integer, got 99\.0"),
        (100, {"end_step": 101}, ValueError, "end_step=101 lies behind the training's last step, total_steps=100"),
        (100, {"end_step": 5}, ValueError, "end_step must come after begin_step=5, got 5"),
        (100, {"end_step": "x"}, TypeError, "end_step must be an integer"),
        (100, {"begin_step": None}, TypeError, "begin_step must be an integer"),
        (100, {"stop": 3}, TypeError, "stop"),
    ],
)
def test_lengths_that_make_no_schedule(total, others, error, message):
    with pytest.raises(error, match=message):
        PolynomialDecay.for_training(total, **others)
    with pytest.raises(error, match=message):
        ThresholdRamp.for_training(total, 0.1, **others)


@pytest.mark.parametrize("block_size", [(1, 1), (3, 2), (16, 1)])
@pytest.mark.parametrize("score", ["max", "mean", "l2"])
def test_from_weights_takes_the_percentile_of_pooled_block_scores(block_size, score):
    model = nn.Sequential(nn.LSTM(5, 7, num_layers=2, bidirectional=True), nn.Linear(3, 3))
    schedule = ThresholdRamp.from_weights(model, 0.6, names="*weight_hh*", pattern=block_size, score=score, **SPAN)
    scores = torch.cat(
        [
            Blocks(*block_size).scores(weight.detach().unflatten(0, (4, -1)), score).flatten()
            for name, weight in model.named_parameters()
            if "weight_hh" in name
        ]
    )
    assert (scores <= schedule.q).sum() == round(0.6 * len(scores))
    assert (schedule.begin_step, schedule.frequency) == (1, 100)


def test_from_weights_with_tied_gates_pools_unit_groups():
    layer = nn.GRU(4, 8)
    scores = {"max": lambda gates: gates.abs().amax(0), "l2": lambda gates: gates.norm(dim=0)}
    for score, combined in scores.items():
        options: dict[str, Any] = {"names": "*ih*", "pattern": (1, 1), "score": score, "tie_gates": True}
        tied = ThresholdRamp.from_weights(layer, 0.5, **options, **SPAN)
        assert (combined(layer.get_parameter("weight_ih_l0").detach().unflatten(0, (3, 8))) <= tied.q).sum() == 16


def test_from_weights_refuses_what_gives_no_threshold():
    layer = nn.GRU(4, 8)
    with pytest.raises(ValueError, match=r"names='rnn\.\*' matched no"):
        ThresholdRamp.from_weights(layer, names="rnn.*", **SPAN)
    with pytest.raises(ValueError, match=r"gives q=0\.0"):
        ThresholdRamp.from_weights(layer, 1e-9, **SPAN)
    nn.init.zeros_(layer.get_parameter("weight_hh_l0"))
    with pytest.raises(ValueError, match=r"gives q=0\.0"):
        ThresholdRamp.from_weights(layer, names="*hh*", **SPAN)
    nn.init.constant_(layer.get_parameter("weight_hh_l0"), math.nan)
    with pytest.raises(ValueError, match="gives q=inf"):
        ThresholdRamp.from_weights(layer, names="*hh*", **SPAN)
    with pytest.raises(ValueError, match="score must be one of 'max', 'mean', 'l2', got 'min'"):
        ThresholdRamp.from_weights(layer, score="min", **SPAN)


def test_one_shot_and_constant_mask():
    assert updates(OneShot(sparsity=0.5, step=7)) == [7]
    assert [OneShot(sparsity=0.5, step=7).sparsity_at(step) for step in (6, 7, 8)] == [0, 0.5, 0.5]
    assert updates(ConstantMask()) == [0]
    assert (OneShot(sparsity=0.5, step=7).last_step, ConstantMask().last_step) == (7, 0)


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    [
        (PolynomialDecay, DECAY | {"final_sparsity": 1}, ValueError, r"final_sparsity must be in \[0, 1\), got 1"),
        (PolynomialDecay, DECAY | {"final_sparsity": -0.1}, ValueError, "final_sparsity"),
        (PolynomialDecay, DECAY | {"final_sparsity": math.nan}, ValueError, "final_sparsity"),
        (PolynomialDecay, DECAY | {"final_sparsity": "0.9"}, TypeError, "final_sparsity"),
        (PolynomialDecay, DECAY | {"initial_sparsity": 0.95}, ValueError, "must not exceed final_sparsity=0.9"),
        (PolynomialDecay, DECAY | {"end_step": 10}, ValueError, "end_step must come after begin_step=10, got 10"),
        (PolynomialDecay, DECAY | {"end_step": 9}, ValueError, "end_step"),
        (PolynomialDecay, DECAY | {"begin_step": -1}, ValueError, "begin_step must be at least 0, got -1"),
        (PolynomialDecay, DECAY | {"begin_step": 1.0}, TypeError, "begin_step must be an integer, got 1.0"),
        (PolynomialDecay, DECAY | {"begin_step": True}, TypeError, "begin_step"),
        (PolynomialDecay, DECAY | {"frequency": 0}, ValueError, "frequency must be at least 1, got 0"),
        (PolynomialDecay, DECAY | {"power": 0}, ValueError, "power"),
        (PolynomialDecay, DECAY | {"power": math.inf}, ValueError, "power"),
        (ThresholdRamp, RAMP | {"q": 0}, ValueError, "q must be a finite number above 0, got 0"),
        (ThresholdRamp, RAMP | {"q": math.nan}, ValueError, "q must"),
        (
            ThresholdRamp,
            RAMP | {"ramp_step": 9},
            ValueError,
            "ramp_step must lie between begin_step=10 and end_step=60",
        ),
        (ThresholdRamp, RAMP | {"ramp_step": 61}, ValueError, "ramp_step"),
        (ThresholdRamp, RAMP | {"end_step": 5}, ValueError, "end_step"),
        (ThresholdRamp, RAMP | {"slope_ratio": -1}, ValueError, "slope_ratio"),
        (ThresholdRamp, RAMP | {"frequency": 2.5}, TypeError, "frequency"),
        (OneShot, {"sparsity": 1.0, "step": 3}, ValueError, "sparsity"),
        (OneShot, {"sparsity": 0.5, "step": -3}, ValueError, "step must be at least 0"),
    ],
)
def test_bad_arguments_are_named(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        kind(**arguments)


@pytest.mark.parametrize(
    ("kind", "arguments", "plain"),
    [
        (
            PolynomialDecay,
            {"final_sparsity": np.float64(0.75), "begin_step": np.int64(1), "end_step": np.int32(9), "power": 2},
            PolynomialDecay(final_sparsity=0.75, begin_step=1, end_step=9, power=2.0),
        ),
        (
            ThresholdRamp,
            {"q": np.float32(0.5), "begin_step": 1, "ramp_step": np.uint8(4), "end_step": 9, "slope_ratio": 2},
            ThresholdRamp(q=0.5, begin_step=1, ramp_step=4, end_step=9, slope_ratio=2.0),
        ),
        (OneShot, {"sparsity": np.float16(0.5), "step": np.int64(5)}, OneShot(sparsity=0.5, step=5)),
    ],
)
def test_numbers_of_numpy_become_plain(kind, arguments, plain):
    assert repr(kind(**arguments)) == repr(plain)  # which a checkpoint compares
    for refused in (np.True_, np.str_("1"), np.array([1])):
        with pytest.raises(TypeError, match="must be"):
            kind(**arguments | dict.fromkeys(arguments, refused))


def test_from_weights_takes_numbers_of_numpy_and_names_wrong_types():
    layer, size = nn.GRU(4, 8), (np.int64(2), 1)
    ramp = ThresholdRamp.from_weights(layer, np.float64(0.5), pattern=size, **SPAN)  # type: ignore[arg-type]
    assert ramp == ThresholdRamp.from_weights(layer, 0.5, pattern=(2, 1), **SPAN)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        ThresholdRamp.from_weights("x", **SPAN)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"names must be a glob .* got 3"):
        ThresholdRamp.from_weights(layer, names=3, **SPAN)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", [PolynomialDecay(**DECAY), ThresholdRamp(**RAMP), ConstantMask()], ids=repr)
def test_schedules_are_frozen_and_keyword_only(schedule):
    assert schedule == dataclasses.replace(schedule)
    with pytest.raises(TypeError):
        type(schedule)(0.9)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.end_step = 3
