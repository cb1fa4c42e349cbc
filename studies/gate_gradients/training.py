"""One run: a model trained on a task with one way to choose gate gradients, and what came of it."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from studies.gate_gradients.distribution import GATES, Probe, describe
from studies.gate_gradients.rows import CALIBRATION_SEED, QUANTILES, Row
from studies.runs.records import Key
from studies.runs.spread import thinned
from studies.runs.study import OnStep
from studies.tasks import Task
from triton_sparse_rnn import GateGradientSparsity, GateGradientStats, SparseLSTM

EARLY = 0.1  # of the steps: where the distribution is read first, and how long "start", "middle" and "end" are
LOSSES = 20  # means of the training loss that are kept


class Course(NamedTuple):
    """What was seen while a model trained: of every step, and of the moments at which gate gradients were read."""

    losses: list[float]
    stats: list[GateGradientStats]
    distribution: dict[str, dict[str, Any]]


def train(task: Task, row: Row, key: Key, thresholds: Mapping[float, float], on_step: OnStep) -> dict[str, Any]:
    """Train a model and evaluate it.

    The dense run of CALIBRATION_SEED also reads how its gate gradients are distributed, early and at its end.

    Args:
        thresholds: for a row with a quantile; see `calibrated_thresholds`.
    Returns:
        What the line of the run holds.
    """
    arguments: dict[str, Any] = {}
    make_rnn = SparseLSTM
    if not row.is_dense:
        arguments = row.gate_gradient(seed=key.seed, steps=key.steps, loss_scale=task.loss_scale, thresholds=thresholds)
        make_rnn = functools.partial(SparseLSTM, gate_gradient=GateGradientSparsity(**arguments))
    model = task.build_model(make_rnn, key.seed).train()
    calibrates = row.is_dense and key.seed == CALIBRATION_SEED
    moments = {"early": round(EARLY * (key.steps - 1)), "late": key.steps - 1} if calibrates else {}
    course = _optimize(model, task, key, moments, on_step)
    redundant = course.stats[-1].mean_redundant_macs if course.stats else 0.0
    return {
        "gate_gradient": arguments,
        "quality": task.evaluate(model.eval(), "validation"),
        "zeros": zeros_over_time(course.stats),
        "redundant_macs": {"rnn": redundant, "model": redundant * recurrent_share(model)},
        "training_loss": thinned(course.losses, LOSSES),
        "distribution": course.distribution,
    }


def _optimize(model: nn.Module, task: Task, key: Key, moments: Mapping[str, int], on_step: OnStep) -> Course:
    """Train with Adam; at the steps in `moments` read the gate gradients of a dense layer."""
    rnn = model.rnn
    assert isinstance(rnn, SparseLSTM)
    optimizer = torch.optim.Adam(model.parameters())
    course, batches = Course([], [], {}), task.losses(model, key.seed)
    for step in range(key.steps):
        optimizer.param_groups[0]["lr"] = task.learning_rate(step, key.steps)
        probe = Probe(rnn) if step in moments.values() else None
        loss = next(batches)
        optimizer.zero_grad()
        loss.backward()
        if probe is not None:
            found = {"step": step} | describe(*probe.read(), QUANTILES)
            course.distribution.update({moment: found for moment, at in moments.items() if at == step})
        optimizer.step()
        course.losses.append(loss.item())
        if (stats := rnn.gate_gradient_stats) is not None:
            course.stats.append(stats)
        on_step(course.losses[-1])
    return course


def calibrated_thresholds(dense: dict[str, Any], loss_scale: float) -> dict[float, float]:
    """Return the quantiles of a dense run's early gate gradients, in units of the gradient of the summed loss."""
    quantiles = dense["distribution"]["early"]["quantiles"]
    return {float(share): value / loss_scale for share, value in quantiles.items()}


def zeros_over_time(stats: Sequence[GateGradientStats]) -> dict[str, dict[str, float]]:
    """Return for each gate the mean share of zeros at the start, in the middle, at the end and of the whole training.

    Args:
        stats: of every step; directions count alike.
    """
    if not stats:
        return {}
    length = max(1, round(EARLY * len(stats)))
    middle = (len(stats) - length) // 2
    parts = {"start": stats[:length], "middle": stats[middle : middle + length], "end": stats[-length:]}
    shares = {part: [one.zeros for one in steps] for part, steps in parts.items()} | {"mean": [stats[-1].mean_zeros]}
    return {
        gate: {
            part: statistics.fmean(direction[gate] for step in steps for direction in step.values())
            for part, steps in shares.items()
        }
        for gate in GATES
    }


def recurrent_share(model: nn.Module) -> float:
    """Return the recurrent layer's part of a model's multiply-accumulates in training.

    All layers see the same rows, and each weight of the recurrent and linear layers is a factor of three products for
    each row: forward, the gradient of the layer's input, its own.
    """
    rnn = model.rnn
    assert isinstance(rnn, nn.RNNBase)
    recurrent = sum(weight.numel() for name, weight in rnn.named_parameters() if name.startswith("weight"))
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    return recurrent / (recurrent + linear)
