"""The evidence for pruning: tiny runs, and tables and plots of numbers that are made up."""

import copy
import dataclasses
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from studies.accuracy import timing
from studies.accuracy.plots import plot_all
from studies.accuracy.rows import DENSE, GRADUAL, HEADLINE, ONE_SHOT, ROWS, SEEDS, SENSITIVITY, SMALL, WIDE
from studies.accuracy.sizes import Size, parameters, recurrent_weights, size_of
from studies.accuracy.study import ACCURACY
from studies.accuracy.summary import models_of
from studies.accuracy.table import tables
from studies.accuracy.timing import time_runs
from studies.accuracy.training import make_pruner
from studies.runs.records import Key, Lines, key_of
from studies.runs.study import Place, weights_path
from studies.tasks import TASKS
from studies.tasks.characters import Characters
from triton_sparse_rnn import SparseGRU, to_dense

NAMES = {row.name: row for row in ROWS}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def task(text):
    return Characters(text, embedding_size=40, hidden_size=33, batch_size=3, window=6, held_out=100)


@pytest.fixture
def tiny(task, monkeypatch):
    """What is timed is the tiny task."""
    monkeypatch.setitem(TASKS, "characters", type("Tiny", (), {"load": staticmethod(lambda: task)}))


def run(task, row, steps, folder):
    return ACCURACY.run(task, row, Key("characters", row.name, 0, steps), Place(folder / "runs.jsonl", folder))


# Sizes


def test_parameters_are_those_of_the_model(task):
    model = task.build_model(SparseGRU, 0)
    assert sum(parameters(task, 33)) == sum(parameter.numel() for parameter in model.parameters())
    assert parameters(task, 33).prunable == 3 * 33 * (40 + 33)
    assert parameters(task, 33).left_at(0.75) == parameters(task, 33).others + 0.25 * parameters(task, 33).prunable


def test_a_small_model_has_as_many_parameters_as_the_pruned_one(task):
    wanted = parameters(task, 33).left_at(0.9)
    H = size_of(task, SMALL).hidden_size
    distances = [abs(parameters(task, width).left_at(0) - wanted) for width in (H - 1, H, H + 1)]
    assert min(distances) == distances[1]
    assert size_of(task, SMALL).sparsity is None


def test_a_wide_model_has_as_many_recurrent_weights_as_the_pruned_one(task):
    H, sparsity = size_of(task, WIDE)
    assert H == 50
    assert sparsity is not None
    assert (1 - sparsity) * parameters(task, 50).prunable == pytest.approx(0.1 * parameters(task, 33).prunable)
    assert size_of(task, GRADUAL) == Size(33, 0.9)
    assert size_of(task, DENSE) == Size(33, None)


# Rows


def test_selections():
    assert ACCURACY.rows("headline") == [DENSE, SMALL, GRADUAL, WIDE, ONE_SHOT]
    varied = ACCURACY.rows("sensitivity")[1:]
    assert varied == [row for row in ROWS if row.family.startswith(SENSITIVITY)]
    assert len(ACCURACY.rows("headline")) + len(ACCURACY.rows("others")) + len(varied) == len(ROWS) + 1
    assert all(row.seeds == (SEEDS if row.family == HEADLINE else (0,)) for row in ROWS)


@pytest.mark.parametrize("row", [row for row in ROWS if not row.is_dense], ids=lambda row: row.name)
def test_every_row_is_pruned_as_it_says(task, row, tmp_path):
    steps = 400
    model, size = task.build_model(SparseGRU, 0), size_of(task, row)
    save_file(model.state_dict(), tmp_path / "dense")
    if row.width != 1:
        model = dataclasses.replace(task, hidden_size=size.hidden_size).build_model(SparseGRU, 0)
    pruner = make_pruner(model, row, size, steps, tmp_path / "dense")
    assert pruner.block_size == tuple(row.pruner.get("block_size", (16, 1)))
    assert (pruner.tie_gates, pruner.balanced) == tuple(
        bool(row.pruner.get(name)) for name in ("tie_gates", "balanced")
    )
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
    names = ["gradual, 90 %", "ThresholdRamp, q at 90 %", "L1, then hard pruning, 1x1", "weight_hh only, 90 %"]
    names += ["group lasso and gradual", "small dense, taught by the dense model"]
    runs = {name: run(task, NAMES[name], 12, tmp_path) for name in ["dense", *names]}
    total = sum(parameters(task, 33))
    assert runs["dense"]["parameters"] == total
    assert [model["weight_dtype"] for model in runs["gradual, 90 %"]["models"]] == ["float32", "float16", "int8"]
    for name, found in runs.items():
        assert found["models"][0]["quality"]["bits_per_character"] > 0
        assert found.keys() >= ACCURACY.records.fields
        weights = load_file(weights_path(tmp_path, key_of(found)))
        kept = sum(int((tensor != 0).sum()) for key, tensor in weights.items() if "weight" in key and "rnn" in key)
        others = sum(tensor.numel() for key, tensor in weights.items() if not ("weight" in key and "rnn" in key))
        assert found["parameters"] == kept + others
        if found["forecast"] and "Ramp" not in name:
            assert found["forecast"]["nbytes"] == found["became"]["nbytes"]
            assert found["forecast"]["sparsity"] == pytest.approx(found["became"]["sparsity"], abs=0.01)
    assert runs["gradual, 90 %"]["became"]["sparsity"] == pytest.approx(0.86, abs=0.01)
    assert runs["small dense, taught by the dense model"]["hidden_size"] == size_of(task, SMALL).hidden_size
    hh = load_file(weights_path(tmp_path, Key("characters", "weight_hh only, 90 %", 0, 12)))
    assert hh["rnn.weight_ih_l0"].ne(0).all()
    assert hh["rnn.weight_hh_l0"].eq(0).double().mean() == pytest.approx(0.86, abs=0.02)


def test_a_penalty_draws_weights_towards_zero_until_pruning_ends(task, tmp_path):
    row = dataclasses.replace(NAMES["L1, then hard pruning, 1x1"], strength=0.0)
    sizes = {}
    for strength in (0.0, 1e-2):
        found = run(task, dataclasses.replace(row, strength=strength), 8, tmp_path)
        weights = load_file(weights_path(tmp_path, key_of(found)))
        sizes[strength] = sum(tensor.abs().sum() for name, tensor in weights.items() if "rnn.weight" in name)
    assert sizes[1e-2] < sizes[0.0]


def test_rounded_dense_models_are_not_the_float32_ones(task, tmp_path):
    models = run(task, DENSE, 3, tmp_path)["models"]
    exact, rounded = (model["quality"]["bits_per_character"] for model in models)
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
    runs = {key_of(found): found for row in (DENSE, GRADUAL) for found in [run(task, row, 3, tmp_path)]}
    varied = next(row for row in ROWS if row.family.startswith(SENSITIVITY))
    lines = Lines(runs | {Key("characters", varied.name, 0, 3): {}}, {})
    timed = [*time_runs(lines, tmp_path, rounds=2, console=quiet)]
    assert [key_of(line)[1] for line in timed] == ["dense", "gradual, 90 %"]
    assert [time["weight_dtype"] for time in timed[1]["times"]] == ["float32", "float16", "int8"]
    assert all(time["us_per_step"] > 0 < time["torch_us_per_step"] for line in timed for time in line["times"])
    with pytest.raises(FileNotFoundError):
        next(time_runs(lines, tmp_path / "nowhere", rounds=1, console=quiet))


def test_no_time_of_a_wrong_layer(tiny, task, tmp_path, quiet, monkeypatch):
    found = run(task, GRADUAL, 3, tmp_path)
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


# Tables and plots


def made_up(row="dense", seed=0, value=2.0, steps=500, task="characters", **others):
    pruned = not NAMES[row].is_dense
    dtypes = [str(dtype).removeprefix("torch.") for dtype in NAMES[row].weight_dtypes]
    told = {"sparsity": 0.9, "nbytes": 1000, "macs_per_step": 100}
    return {
        "task": task,
        "row": row,
        "seed": seed,
        "steps": steps,
        "settings": {},
        "hidden_size": 256,
        "pruner": {"block_size": [16, 1]} if pruned else None,
        "sparsity": 0.9 if pruned else 0.0,
        "parameters": 57_000 if pruned else 278_000,
        "forecast": told if pruned else None,
        "became": told | {"sparsity": 0.85, "nbytes": 1250} if pruned else None,
        "models": [
            {
                "weight_dtype": dtype,
                "bytes": 230_000 // (k + 1),
                "quality": {metric.key: value + k / 100 for metric in TASKS[task].metrics},
            }
            for k, dtype in enumerate(dtypes)
        ],
        "seconds": 60.0,
        "processor": "a processor",
        "versions": {"torch": "2.13"},
        **others,
    }


TIMED = Key("characters", "gradual, 90 %", 0, 500)


def many():
    runs = [made_up(seed=seed, value=2.0 + seed / 10) for seed in range(3)]
    runs += [made_up("gradual, 90 %", seed=seed, value=2.2 + seed / 10) for seed in range(3)]
    runs += [
        made_up("hard pruning, 90 %", value=2.42),
        made_up("end_step 35 %", value=2.31),
        made_up("power 1", value=2.09),
        made_up("ThresholdRamp, q at 95 %", value=2.0),
        made_up("ramp_step 10 %", value=2.4),
    ]
    runs += [made_up(task="pronunciation", value=10.0)]
    times = {"times": [{"weight_dtype": "float32", "us_per_step": 2.25, "torch_us_per_step": 44.5}]}
    return Lines({key_of(one): one for one in runs}, {TIMED: times})


def test_table():
    lines = tables(many()).splitlines()
    assert lines[2] == "| model | characters, 500 steps | pronunciation, 500 steps |"
    assert "| gradual, 90 % | +9.5 (+9.1 to +10.0) |  |" in lines
    assert "## characters, 500 steps" in lines
    assert "| dense | 256 | 0.0 | 2.100 (2.000 to 2.200) |  | 278,000 | 230,000 |  |  | 3 |" in lines
    percent = "+9.5 (+9.1 to +10.0)"
    kept = f"| gradual, 90 % | 256 | 90.0 | 2.300 (2.200 to 2.400) | {percent} | 57,000 | 230,000 | 2.25 | 44.5 | 3 |"
    assert kept in lines
    assert any(line.startswith("| gradual, 90 %, int8 | 256 | 90.0 | 2.320") for line in lines)
    assert not any(line.startswith("| end_step 35 % | 256") for line in lines)
    assert "| hard pruning: 7 to 9 % worse than gradual | +10.0 |  |" in lines
    assert "| pruned, same width: 14 to 21 % worse than dense | +9.5 (+9.1 to +10.0) |  |" in lines
    assert "| end_step | end_step 35 % | 90.0 | 2.310 | +5.0 |" in lines
    assert "| power | power 1 | 90.0 | 2.090 | -5.0 |" in lines
    assert "| ramp_step | ramp_step 10 % | 90.0 | 2.400 | +20.0 |" in lines
    assert "| characters | gradual, 90 % | 16x1 | 90.0 | 85.0 | +5.0 (+5.0 to +5.0) | -20.0 | 3 |" in lines
    assert "11 runs, 11 minutes on a processor, torch 2.13." in lines


def test_a_row_without_its_dense_run_has_no_difference():
    runs = [made_up("gradual, 90 %", seed=1), made_up(seed=0)]
    found = models_of(Lines({key_of(one): one for one in runs}, {}))[0]
    assert [model.name for model in found.models][:3] == ["dense", "dense, float16", "gradual, 90 %"]
    assert found.models[2].loss_percent is None


def test_plots(tmp_path):
    names = ["accuracy-parameters.png", "accuracy-time.png", "accuracy-schedule-characters.png"]
    assert plot_all(many(), tmp_path) == [tmp_path / name for name in names]
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in names)
