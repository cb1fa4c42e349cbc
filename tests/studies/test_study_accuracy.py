"""The evidence for pruning: tiny runs, and tables and plots of numbers that are made up."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from studies.accuracy import timing, training
from studies.accuracy.rows import (
    CLAIM_ROWS,
    CLAIMS,
    DENSE,
    IN_BLOCKS,
    LONG,
    LONG_ROWS,
    PRUNED,
    RAMP,
    ROWS,
    SEEDS,
    SELF_TAUGHT,
    SENSITIVITY,
    SMALL,
    WIDE,
)
from studies.accuracy.sizes import Size, parameters, recurrent_weights, size_of
from studies.accuracy.study import ACCURACY
from studies.accuracy.timing import time_runs
from studies.accuracy.training import make_diagonal, make_pruner
from studies.runs.records import Key, Lines, key_of
from studies.runs.study import Place, weights_path
from studies.tasks import TASKS
from studies.tasks.characters import Characters
from triton_sparse_rnn import Blocks, Picks, SparseGRU, to_dense

NAMES = {row.name: row for row in ROWS}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def task(text):
    return Characters(text, embedding_size=40, hidden_size=33, batch_size=3, window=6, scored=100)


@pytest.fixture
def tiny(task, monkeypatch):
    """What is timed is the tiny task."""
    monkeypatch.setitem(TASKS, "characters", type("Tiny", (), {"load": staticmethod(lambda: task)}))


def run(task, row, steps, folder):
    return ACCURACY.run(task, row, Key("characters", row.name, 0, steps), Place(folder / "runs.jsonl", folder))


# Sizes


def test_parameters_are_those_of_the_model(task):
    model = task.build_model(SparseGRU, 0)
    found = parameters(task)
    assert sum(found) == sum(parameter.numel() for parameter in model.parameters())
    assert found.prunable == 3 * 33 * (40 + 33)
    assert found.left_at(0.75) == found.others + 0.25 * found.prunable


def test_a_small_model_has_as_many_parameters_as_the_pruned_one(task):
    wanted = parameters(task).left_at(0.9)
    H = size_of(task, SMALL).hidden_size
    distances = [abs(parameters(task.resized(width)).left_at(0) - wanted) for width in (H - 1, H, H + 1)]
    assert min(distances) == distances[1]
    assert size_of(task, SMALL).sparsity is None


def test_models_of_another_shape_have_as_many_recurrent_weights_as_the_pruned_one(task):
    for name, H, inputs in (
        ("1.5 times as wide, as many weights in picks", 50, 1.0),
        ("picks, half as many inputs, as many weights", 33, 0.5),
    ):
        size = size_of(task, NAMES[name])
        assert size.hidden_size == H
        assert size.sparsity is not None
        kept = (1 - size.sparsity) * parameters(task.resized(H, inputs)).prunable
        assert kept == pytest.approx(0.1 * parameters(task).prunable)
    assert size_of(task, WIDE) == Size(50, 0.9)
    assert size_of(task, PRUNED) == Size(33, 0.9)
    assert size_of(task, DENSE) == Size(33, None)


# Rows


def test_selections():
    assert ACCURACY.rows("claims") == [*CLAIM_ROWS]
    assert ACCURACY.rows(ACCURACY.usual) == [*LONG_ROWS]
    varied = [row for row in ACCURACY.rows("sensitivity") if row not in (DENSE, IN_BLOCKS, RAMP)]
    assert varied == [row for row in ROWS if row.family.startswith(SENSITIVITY)]
    parts = ("long", "short", "sensitivity")
    assert {row.name for row in ROWS} == {row.name for part in parts for row in ACCURACY.rows(part)}
    assert len(NAMES) == len(ROWS)
    assert all(row.seeds == (SEEDS if row.family == CLAIMS else (0,)) for row in ROWS)
    assert not any(row.is_tested for row in ROWS if row not in LONG_ROWS)


def test_rows_that_suit_a_task(task, tmp_path, quiet, monkeypatch):
    ran = []
    monkeypatch.setattr(type(ACCURACY), "run", lambda *arguments: ran.append(arguments[3].row) or {"seconds": 0})
    monkeypatch.setattr(type(ACCURACY.records), "append", lambda *arguments: None)
    study = dataclasses.replace(ACCURACY, outcome=lambda *arguments: "", suits=lambda task, row: row is not WIDE)
    study.run_missing(task, [DENSE, WIDE, PRUNED], Place(tmp_path / "a", tmp_path), seeds=[0], console=quiet)
    assert ran == [DENSE.name, PRUNED.name]


@pytest.mark.parametrize("row", [row for row in ROWS if not row.is_dense], ids=lambda row: row.name)
def test_every_row_is_pruned_as_it_says(task, row, tmp_path):
    steps = 400
    model, size = task.build_model(SparseGRU, 0), size_of(task, row)
    save_file(model.state_dict(), tmp_path / "dense")
    if row.width != 1 or row.inputs != 1:
        model = task.resized(size.hidden_size, row.inputs).build_model(SparseGRU, 0)
    pruner = make_pruner(model, row, size, steps, tmp_path / "dense")
    picks = "picks" in row.pruner
    assert pruner.pattern == (Picks(*row.pruner["picks"]) if picks else Blocks(*row.pruner["block_size"]))
    assert pruner.tie_gates == row.pruner.get("tie_gates", False)
    assert pruner.split == row.pruner.get("split", "gate")
    if row.diagonal:
        return
    assert pruner.balanced == row.pruner.get("balanced", picks)
    for weight in pruner.weights:
        for gate, schedule in zip("rzn", weight.schedules, strict=True):
            assert schedule is not None
            assert type(schedule).__name__ == row.schedule
            assert schedule.last_step <= steps
            for name, share in row.fractions.items():
                assert getattr(schedule, name) == max(name == "frequency", round(share * steps))
            if row.schedule != "ThresholdRamp":
                assert schedule.sparsity_at(steps) == row.gates.get(gate, size.sparsity)


# Runs


@pytest.mark.slow("studies")
def test_runs_of_a_task(task, tmp_path):
    """The dense model first, then one of each kind that differs in how it is trained."""
    names = [PRUNED.name, IN_BLOCKS.name, SELF_TAUGHT.name, LONG.name, "block-diagonal", "picks, rate constant"]
    names += ["picks, half as many inputs, as many weights", "picks, one budget for the layer"]
    names += ["ThresholdRamp, q at 90 %", "L1, then hard pruning, 1x1", "weight_hh only, 90 %"]
    names += ["group lasso and gradual", "small dense, taught by the dense model"]
    runs = {name: run(task, NAMES[name], 12, tmp_path) for name in [DENSE.name, *names]}
    total = sum(parameters(task))
    assert runs[DENSE.name]["parameters"] == total
    assert [model["weight_dtype"] for model in runs[PRUNED.name]["models"]] == ["float32", "int8"]
    twice = {name for name, found in runs.items() if found["trained_steps"] == 24}
    assert twice == {SELF_TAUGHT.name, LONG.name}
    for name, found in runs.items():
        quality = found["models"][0]["quality"]
        assert [*quality] == (["validation", "test"] if NAMES[name].is_tested else ["validation"])
        assert all(values["bits_per_character"] > 0 for values in quality.values())
        assert found.keys() >= ACCURACY.records.fields
        weights = load_file(weights_path(tmp_path, key_of(found)))
        kept = sum(int((tensor != 0).sum()) for key, tensor in weights.items() if "weight" in key and "rnn" in key)
        others = sum(tensor.numel() for key, tensor in weights.items() if not ("weight" in key and "rnn" in key))
        assert found["parameters"] == kept + others
        if found["forecast"] and "Ramp" not in name and not NAMES[name].diagonal:
            assert found["forecast"]["sparsity"] == pytest.approx(found["became"]["sparsity"], abs=0.01)
    assert runs[IN_BLOCKS.name]["forecast"]["nbytes"] == runs[IN_BLOCKS.name]["became"]["nbytes"]
    assert runs["small dense, taught by the dense model"]["hidden_size"] == size_of(task, SMALL).hidden_size
    hh = load_file(weights_path(tmp_path, Key("characters", "weight_hh only, 90 %", 0, 12)))
    assert hh["rnn.weight_ih_l0"].ne(0).all()
    assert hh["rnn.weight_hh_l0"].eq(0).double().mean() == pytest.approx(0.86, abs=0.02)


def test_a_block_diagonal_model_stays_one(task, tmp_path):
    model = task.build_model(SparseGRU, 0)
    dense = [weight.detach().clone() for weight in recurrent_weights(model)]
    make_diagonal(model, 10)
    for before, weight in zip(dense, recurrent_weights(model), strict=True):
        kept = weight != 0
        assert kept.double().mean() == pytest.approx(0.1, abs=0.005)
        assert torch.equal(weight[kept], before[kept] * 10**0.5)
        gates = kept.view(3, 33, -1)
        assert torch.equal(gates[0], gates[2])
        assert gates[0][:3, :3].all()
        assert gates[0][-3:, -3:].all()
    found = run(task, NAMES["block-diagonal"], 3, tmp_path)
    weights = load_file(weights_path(tmp_path, key_of(found)))
    assert torch.equal(weights["rnn.weight_hh_l0"] != 0, recurrent_weights(model)[1] != 0)


def test_a_training_that_begins_dense_begins_there(task, tmp_path, monkeypatch):
    dense = run(task, DENSE, 3, tmp_path)
    seen = []
    monkeypatch.setattr(training, "_optimize", lambda model, *others: seen.append(copy.deepcopy(model)) or [0.0])
    run(task, SELF_TAUGHT, 3, tmp_path)
    weights = load_file(weights_path(tmp_path, key_of(dense)))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in seen[0].state_dict().items())


def test_a_penalty_draws_weights_towards_zero_until_pruning_ends(task, tmp_path):
    row = dataclasses.replace(NAMES["L1, then hard pruning, 1x1"], strength=0.0)
    sizes = {}
    for strength in (0.0, 1e-2):
        found = run(task, dataclasses.replace(row, strength=strength), 8, tmp_path)
        weights = load_file(weights_path(tmp_path, key_of(found)))
        sizes[strength] = sum(tensor.abs().sum() for name, tensor in weights.items() if "rnn.weight" in name)
    assert sizes[1e-2] < sizes[0.0]


def test_rounded_dense_models_are_not_the_float32_ones(task, tmp_path):
    models = run(task, dataclasses.replace(DENSE, weight_dtypes=(torch.float32, torch.float16)), 3, tmp_path)["models"]
    exact, rounded = (model["quality"]["test"]["bits_per_character"] for model in models)
    assert exact != rounded
    assert exact == pytest.approx(rounded, rel=1e-2)
    assert models[1]["bytes"] < 0.6 * models[0]["bytes"]


def test_a_taught_model_does_not_change_its_teacher(task, tmp_path):
    path = weights_path(tmp_path, key_of(run(task, DENSE, 3, tmp_path)))
    before = path.read_bytes()
    plain = run(task, SMALL, 3, tmp_path)
    taught = run(task, NAMES["small dense, taught by the dense model"], 3, tmp_path)
    assert taught["training_loss"] != plain["training_loss"]
    assert path.read_bytes() == before


# Times


def test_layers_are_timed(tiny, task, tmp_path, quiet):
    runs = {key_of(found): found for row in (DENSE, PRUNED) for found in [run(task, row, 3, tmp_path)]}
    varied = next(row for row in ROWS if row.family.startswith(SENSITIVITY))
    lines = Lines(runs | {Key("characters", varied.name, 0, 3): {}}, {})
    timed = [*time_runs(lines, tmp_path, rounds=2, console=quiet)]
    assert [key_of(line)[1] for line in timed] == ["dense", PRUNED.name]
    assert [time["weight_dtype"] for time in timed[1]["times"]] == ["float32", "int8"]
    assert all(time["us_per_step"] > 0 < time["torch_us_per_step"] for line in timed for time in line["times"])
    with pytest.raises(FileNotFoundError):
        next(time_runs(lines, tmp_path / "nowhere", rounds=1, console=quiet))


def test_no_time_of_a_wrong_layer(tiny, task, tmp_path, quiet, monkeypatch):
    found = run(task, IN_BLOCKS, 3, tmp_path)
    convert = timing.convert

    def wrong(model, **options):
        """A layer that is not the one that its to_dense() tells of."""
        converted, other = convert(model, **options), copy.deepcopy(model)
        recurrent_weights(other)[1].data.mul_(1.01)
        layer: Any = converted.rnn
        dense = to_dense(convert(other, **options)).rnn
        layer.to_dense = lambda: dense
        return converted

    monkeypatch.setattr(timing, "convert", wrong)
    with pytest.raises(ValueError, match="from float64, rounding allows"):
        next(time_runs(Lines({key_of(found): found}, {}), tmp_path, rounds=1, console=quiet))
