"""One run: a model trained on a task while it is pruned, converted, and what came of it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from studies.accuracy.rows import DENSE, Rate, Row
from studies.accuracy.sizes import Size, recurrent_weights, size_of
from studies.runs.records import Key
from studies.runs.spread import thinned
from studies.runs.study import OnStep, Place, keep_weights, weights_path
from studies.tasks import Task
from studies.tasks.task import HeldOut
from studies.tasks.teacher import Teacher
from triton_sparse_rnn import (
    ConstantMask,
    OneShot,
    PolynomialDecay,
    Pruner,
    SparseGRU,
    ThresholdRamp,
    forecast,
    group_lasso,
    l1,
    save_sparse,
    to_sparse,
)
from triton_sparse_rnn.pruning import Schedule
from triton_sparse_rnn.pruning.forecast import Forecast
from triton_sparse_rnn.pruning.targets import Target
from triton_sparse_rnn.sparse.patterns import Blocks
from triton_sparse_rnn.sparse.picks import Picks

PENALTIES = {"l1": lambda model, pattern: l1(model), "group_lasso": group_lasso}
HELD: dict[Rate, float] = {"falling": 0.0, "held": 0.5, "constant": 1.0}  # share of the steps before the rate falls
LARGEST_GRADIENT = 1.0  # to which the norm of all gradients is cut: a held rate makes some trainings blow up without
LOSSES = 20  # means of the training loss that are kept


def train(task: Task, row: Row, key: Key, place: Place, on_step: OnStep) -> dict[str, Any]:
    """Train a model, keep its weights, convert it, and evaluate what was converted.

    Args:
        place: with the models of the runs before, of which some rows need the dense one.
    Returns:
        What the line of the run holds.
    """
    size, steps = size_of(task, row), key.steps * row.length
    task = task.resized(size.hidden_size, row.inputs)
    model = task.build_model(SparseGRU, key.seed).train()
    dense_path = weights_path(place.models, key._replace(row=DENSE.name))
    if row.begins_dense:
        model.load_state_dict(load_file(dense_path))
    if row.diagonal:
        assert size.sparsity is not None
        make_diagonal(model, round(1 / (1 - size.sparsity)))
    pruner = None if row.is_dense else make_pruner(model, row, size, steps, dense_path)
    alike = row.width == row.inputs == 1 and not row.diagonal and dense_path.exists()
    predicted = forecast(model, pruner, load_file(dense_path) if alike else None) if pruner else None
    teacher = _make_teacher(model, task, row, dense_path)
    losses = _optimize(model, task, row, key.seed, steps, pruner, teacher, on_step)
    keep_weights(model, place.models, key)
    weights = recurrent_weights(model)
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    models = [_evaluate(task, model.eval(), row, dtype) for dtype in row.weight_dtypes]
    return {
        "hidden_size": size.hidden_size,
        "pruner": _describe(pruner),
        "sparsity": zeros / sum(weight.numel() for weight in weights) if pruner else 0.0,
        "parameters": sum(parameter.numel() for parameter in model.parameters()) - (zeros if pruner else 0),
        "forecast": _describe_forecast(predicted) if predicted else None,
        "became": _describe_forecast(_outcome(model, row, pruner)) if pruner else None,
        "trained_steps": steps + key.steps * row.begins_dense,
        "models": models,
        "training_loss": thinned(losses, LOSSES),
    }


def make_pruner(model: nn.Module, row: Row, size: Size, steps: int, dense: Path) -> Pruner:
    """Return the row's pruner, for a training of so many steps.

    Args:
        dense: weights of the trained dense model, for a threshold.
    """
    arguments = dict(row.pruner)
    if "picks" in arguments:
        arguments["pattern"] = Picks(*arguments.pop("picks"))
    else:
        arguments["pattern"] = Blocks(*arguments.pop("block_size"))
    if row.diagonal:
        return Pruner(model, ConstantMask(), **arguments)
    chosen: dict[str, Any] = dict(row.arguments) | {
        name: max(int(name == "frequency"), round(share * steps)) for name, share in row.fractions.items()
    }
    targets: dict[str, Target] | None = arguments.pop("targets", None)
    assert size.sparsity is not None
    schedule: Schedule
    if row.schedule == "PolynomialDecay":
        schedule = PolynomialDecay.for_training(steps, size.sparsity, **chosen)
        if row.gates:
            targets = {"*": {gate: dataclasses.replace(schedule, final_sparsity=s) for gate, s in row.gates.items()}}
    elif row.schedule == "OneShot":
        schedule = OneShot(sparsity=size.sparsity, **chosen)
    else:
        reference = copy.deepcopy(model)
        reference.load_state_dict(load_file(dense))
        quantile = chosen.pop("quantile")
        pattern = arguments["pattern"]
        schedule = ThresholdRamp.from_weights(reference, quantile, pattern=pattern, total_steps=steps, **chosen)
    return Pruner(model, schedule, targets=targets, **arguments)


def make_diagonal(model: nn.Module, blocks: int) -> None:
    """Set to zero what is not in so many blocks on the diagonal of each gate; the rest grows, as there is less of it.

    nn.GRU draws weights from +-1 / sqrt(hidden_size), a layer of one block's width would from sqrt(blocks) times that.
    """
    for weight in recurrent_weights(model):
        hidden_size, inputs = weight.shape[0] // 3, weight.shape[1]
        rows = torch.arange(hidden_size).repeat(3) * blocks // hidden_size
        kept = rows[:, None] == torch.arange(inputs) * blocks // inputs
        weight.data.mul_(kept * blocks**0.5)


def _make_teacher(model: nn.Module, task: Task, row: Row, dense: Path) -> Teacher | None:
    """Return the trained dense model, of its own width, as the teacher of `model`."""
    if row.teaching is None:
        return None
    weights = load_file(dense)
    width = weights["rnn.weight_hh_l0"].shape[1]
    trained = task.resized(width).build_model(SparseGRU, 0)
    trained.load_state_dict(weights)
    return Teacher(model, trained.eval(), **dataclasses.asdict(row.teaching))


def _optimize(
    model: nn.Module,
    task: Task,
    row: Row,
    seed: int,
    steps: int,
    pruner: Pruner | None,
    teacher: Teacher | None,
    on_step: OnStep,
) -> list[float]:
    """Train with Adam; return the loss of every step, without the penalty."""
    optimizer = torch.optim.Adam(model.parameters())
    losses, batches = [], task.losses(model, seed, teacher)
    with pruner.attach(optimizer) if pruner else contextlib.nullcontext():
        for step in range(steps):
            rate = row.rate_factor * task.learning_rate(step, steps, HELD[row.rate])
            optimizer.param_groups[0]["lr"] = rate
            loss = next(batches)
            optimizer.zero_grad()
            (loss + _penalty(model, row, pruner)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
            optimizer.step()
            losses.append(loss.item())
            on_step(losses[-1])
    return losses


def _penalty(model: nn.Module, row: Row, pruner: Pruner | None) -> Tensor | float:
    if row.penalty is None or pruner is None or pruner.finished:
        return 0.0
    return row.strength * PENALTIES[row.penalty](model, pruner.pattern)


def _evaluate(task: Task, model: nn.Module, row: Row, weight_dtype: torch.dtype) -> dict[str, Any]:
    """Return quality and size of the model with weights of a dtype, as it is shipped.

    A pruned one is converted. A dense one is run by torch.nn in float32, with rounded weights.
    """
    splits: tuple[HeldOut, ...] = ("validation", "test") if row.is_tested else ("validation",)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        if row.is_dense:
            narrow = {name: tensor.to(weight_dtype).contiguous() for name, tensor in model.state_dict().items()}
            save_file(narrow, path)
            shipped = task.build_model(SparseGRU, 0).eval()
            shipped.load_state_dict(narrow)
        else:
            shipped = convert(model, weight_dtype=weight_dtype)
            save_sparse(shipped, path)
        nbytes = path.stat().st_size
    return {
        "weight_dtype": str(weight_dtype).removeprefix("torch."),
        "bytes": nbytes,
        "quality": {split: task.evaluate(shipped, split) for split in splits},
    }


def convert(model: nn.Module, **options: Any) -> nn.Module:
    """Return the converted model, without a word where there is little to skip: the table says it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return to_sparse(model, **options)


def _outcome(model: nn.Module, row: Row, pruner: Pruner) -> Forecast:
    """Return what the model holds now, in the terms of a forecast: ConstantMask is read off the weights."""
    options = {"pattern": pruner.pattern, "tie_gates": pruner.tie_gates, "targets": row.pruner.get("targets")}
    return forecast(model, Pruner(model, ConstantMask(), **options))


def _describe_forecast(told: Forecast) -> dict[str, Any]:
    return {"sparsity": told.sparsity, "nbytes": told.nbytes, "macs_per_step": told.macs_per_step}


def _describe(pruner: Pruner | None) -> dict[str, Any] | None:
    if pruner is None:
        return None
    schedules: Iterator[Schedule | None] = (schedule for weight in pruner.weights for schedule in weight.schedules)
    return {
        "schedules": sorted({repr(schedule) for schedule in schedules}),
        "pattern": repr(pruner.pattern),
        "score": pruner.score,
        "tie_gates": pruner.tie_gates,
        "balanced": pruner.balanced,
    }
