"""The evidence for pruning: tiny runs, and tables and plots of numbers that are made up."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from studies.accuracy import runner, timing
from studies.accuracy.__main__ import main
from studies.accuracy.rows import (
    DENSE,
    GRADUAL,
    HEADLINE,
    ONE_SHOT,
    RECORDS,
    ROWS,
    SEEDS,
    SENSITIVITY,
    SMALL,
    WIDE,
    rows_of,
)
from studies.accuracy.runner import run_missing
from studies.accuracy.sizes import Size, parameters, recurrent_weights, size_of
from studies.accuracy.summary import sections
from studies.accuracy.table import tables
from studies.accuracy.timing import read_times, time_runs
from studies.accuracy.training import make_pruner, model_path, train
from studies.runs.command_line import INTERRUPTED
from studies.runs.records import Key, key_of
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
    """The command line finds the tiny task under the name of the real one."""
    monkeypatch.setitem(
        TASKS, "characters", type("Tiny", (), {"load": staticmethod(lambda: task), "metrics": task.metrics})
    )


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


def test_rows_have_names_of_their_own():
    assert len(NAMES) == len(ROWS)


def test_selections():
    assert rows_of("headline") == [DENSE, SMALL, GRADUAL, WIDE, ONE_SHOT]
    assert {row.family for row in rows_of("sensitivity")[1:]} == {
        row.family for row in ROWS if row.family.startswith(SENSITIVITY)
    }
    assert len(rows_of("headline")) + len(rows_of("others")) + len(rows_of("sensitivity")) == len(ROWS) + 2
    assert rows_of("all") == list(ROWS)
    assert [row.name for row in rows_of("all", ["tie_gates"])] == ["dense", "tie_gates"]
    assert all(row.seeds == (SEEDS if row.family == HEADLINE else (0,)) for row in ROWS)


@pytest.mark.parametrize("row", [row for row in ROWS if not row.is_dense], ids=lambda row: row.name)
def test_every_row_is_pruned_as_it_says(task, row, tmp_path):
    steps = 400
    model, size = task.build_model(SparseGRU, 0), size_of(task, row)
    save_file(model.state_dict(), tmp_path / "dense")
    if row.width != 1:
        model = dataclasses.replace(task, hidden_size=size.hidden_size).build_model(SparseGRU, 0)
    pruner = make_pruner(model, row, size, steps, tmp_path / "dense")
    assert pruner.pattern.block_size == tuple(row.pruner.get("block_size", (16, 1)))
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


def test_runs_of_a_task(task, tmp_path):
    """The dense model first, then one of each kind that differs in how it is trained."""
    names = ["gradual, 90 %", "ThresholdRamp, q at 90 %", "L1, then hard pruning, 1x1", "weight_hh only, 90 %"]
    names += ["group lasso and gradual", "small dense, taught by the dense model"]
    runs = {name: train(task, NAMES[name], 0, 12, tmp_path) for name in ["dense", *names]}
    total = sum(parameters(task, 33))
    assert runs["dense"]["parameters"] == total
    assert [model["weight_dtype"] for model in runs["gradual, 90 %"]["models"]] == ["float32", "float16", "int8"]
    for name, run in runs.items():
        assert run["models"][0]["quality"]["bits_per_character"] > 0
        assert run.keys() >= {*Key._fields, *RECORDS.fields}
        weights = load_file(model_path(tmp_path, key_of(run)))
        kept = sum(int((tensor != 0).sum()) for key, tensor in weights.items() if "weight" in key and "rnn" in key)
        others = sum(tensor.numel() for key, tensor in weights.items() if not ("weight" in key and "rnn" in key))
        assert run["parameters"] == kept + others
        if run["forecast"] and "Ramp" not in name:
            assert run["forecast"]["nbytes"] == run["became"]["nbytes"]
            assert run["forecast"]["sparsity"] == pytest.approx(run["became"]["sparsity"], abs=0.01)  # blocks at edges
    assert runs["gradual, 90 %"]["became"]["sparsity"] == pytest.approx(0.86, abs=0.01)
    assert runs["small dense, taught by the dense model"]["hidden_size"] == size_of(task, SMALL).hidden_size
    hh = load_file(model_path(tmp_path, Key("characters", "weight_hh only, 90 %", 0, 12)))
    assert hh["rnn.weight_ih_l0"].ne(0).all()
    assert hh["rnn.weight_hh_l0"].eq(0).double().mean() == pytest.approx(0.86, abs=0.02)


def test_a_penalty_draws_weights_towards_zero_until_pruning_ends(task, tmp_path):
    row = dataclasses.replace(NAMES["L1, then hard pruning, 1x1"], strength=0.0)
    sizes = {}
    for strength in (0.0, 1e-2):
        run = train(task, dataclasses.replace(row, strength=strength), 0, 8, tmp_path)
        weights = load_file(model_path(tmp_path, key_of(run)))
        sizes[strength] = sum(tensor.abs().sum() for name, tensor in weights.items() if "rnn.weight" in name)
    assert sizes[1e-2] < sizes[0.0]


def test_rounded_dense_models_are_not_the_float32_ones(task, tmp_path):
    run = train(task, DENSE, 0, 3, tmp_path)
    exact, rounded = (model["quality"]["bits_per_character"] for model in run["models"])
    assert exact != rounded
    assert exact == pytest.approx(rounded, rel=1e-2)
    assert run["models"][1]["bytes"] < 0.6 * run["models"][0]["bytes"]


def test_a_taught_model_does_not_change_its_teacher(task, tmp_path):
    run = train(task, DENSE, 0, 3, tmp_path)
    before = load_file(model_path(tmp_path, key_of(run)))
    plain = train(task, SMALL, 0, 3, tmp_path)
    taught = train(task, NAMES["small dense, taught by the dense model"], 0, 3, tmp_path)
    assert taught["training_loss"] != plain["training_loss"]
    after = load_file(model_path(tmp_path, key_of(run)))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_interrupted_run_goes_on(tiny, tmp_path, monkeypatch, capsys):
    command = ["run", "characters", "--row", "tie_gates", "--steps", "2"]
    command += ["--out", str(tmp_path / "runs.jsonl"), "--models", str(tmp_path / "models")]
    trained, after = [], 2

    def counting(task, row, seed, *args, **kwargs):
        if len(trained) == after:
            raise KeyboardInterrupt
        trained.append((row.name, seed))
        return train(task, row, seed, *args, **kwargs)

    monkeypatch.setattr(runner, "train", counting)
    assert main(command) == INTERRUPTED
    assert "the same command goes on" in capsys.readouterr().err
    after = None
    assert main(command) == 0
    assert trained == [("dense", 0), ("tie_gates", 0), ("dense", 1), ("dense", 2)]
    assert "characters, dense, seed 2: bits per character" in capsys.readouterr().out
    assert [key_of(run)[1:3] for run in RECORDS.read(tmp_path / "runs.jsonl")] == trained
    assert main(command) == 0
    assert len(trained) == 4


def test_other_settings_and_lost_models_are_refused(task, tmp_path, quiet):
    path, models = tmp_path / "runs.jsonl", tmp_path / "models"
    for _ in range(2):
        run_missing(task, [DENSE, SMALL, WIDE], path, models, steps=2, seeds=[0], console=quiet)
    assert len(RECORDS.read(path)) == 3
    with pytest.raises(ValueError, match="'dense' with other settings; name another file"):
        run_missing(dataclasses.replace(task, peak_rate=1.0), [DENSE], path, models, steps=2, seeds=[0], console=quiet)
    with pytest.raises(ValueError, match="lacks the weights of 'dense', seed 0"):
        run_missing(task, [DENSE], path, tmp_path / "others", steps=2, seeds=[0], console=quiet)


@pytest.mark.parametrize("arguments", ["--steps 0", "nonsense", "--rows few", "--row x", "--seed a"])
def test_wrong_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        main(["run", *arguments.split()])
    assert "usage" in capsys.readouterr().err


# Times


def test_layers_are_timed_and_read_again(tiny, task, tmp_path, quiet):
    runs = {key_of(run): run for row in (DENSE, GRADUAL) for run in [train(task, row, 0, 3, tmp_path)]}
    varied = next(row for row in ROWS if row.family.startswith(SENSITIVITY))
    runs |= {Key("characters", varied.name, 0, 3): {}}
    time_runs(runs, tmp_path, tmp_path / "times.jsonl", rounds=2, console=quiet)
    times = read_times([tmp_path / "times.jsonl"])
    assert list(times) == [Key("characters", "dense", 0, 3), Key("characters", "gradual, 90 %", 0, 3)]
    assert list(times[Key("characters", "gradual, 90 %", 0, 3)]) == ["float32", "float16", "int8"]
    assert all(
        model["us_per_step"] > 0 and model["torch_us_per_step"] > 0 for run in times.values() for model in run.values()
    )
    with pytest.raises(FileNotFoundError):
        time_runs(runs, tmp_path / "nowhere", tmp_path / "times.jsonl", rounds=1, console=quiet)


def test_no_time_of_a_wrong_layer(tiny, task, tmp_path, quiet, monkeypatch):
    runs = {key_of(run): run for run in [train(task, GRADUAL, 0, 3, tmp_path)]}
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
        time_runs(runs, tmp_path, tmp_path / "times.jsonl", rounds=1, console=quiet)
    assert not (tmp_path / "times.jsonl").exists()


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
    return {key_of(run): run for run in runs}


def test_table():
    times = {Key("characters", "gradual, 90 %", 0, 500): {"float32": {"us_per_step": 2.25, "torch_us_per_step": 44.5}}}
    lines = tables(many(), times).splitlines()
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


def test_a_command_that_does_not_go_on_does_not_promise_it(monkeypatch, capsys):
    def interrupted(records, paths):
        raise KeyboardInterrupt

    monkeypatch.setattr("studies.runs.records.Records.read_files", interrupted)
    assert main(["table", "runs.jsonl"]) == INTERRUPTED
    assert capsys.readouterr().err == "Stopped\n"


def test_a_row_without_its_dense_run_has_no_difference():
    runs = [made_up("gradual, 90 %", seed=1), made_up(seed=0)]
    found = sections({key_of(run): run for run in runs})[0]
    assert [model.name for model in found.models][:3] == ["dense", "dense, float16", "gradual, 90 %"]
    assert found.models[2].loss_percent is None


def test_plots(tmp_path, capsys):
    path, times = tmp_path / "runs.jsonl", tmp_path / "times.jsonl"
    for run in many().values():
        RECORDS.append(path, run)
        measured = [{"weight_dtype": "float32", "us_per_step": 2.0, "torch_us_per_step": 40.0}]
        timing.RECORDS.append(times, {**key_of(run)._asdict(), "times": measured})
    assert main(["plot", str(path), "--times", str(times), "--out", str(tmp_path / "plots")]) == 0
    names = ["accuracy-parameters.png", "accuracy-time.png", "accuracy-schedule-characters.png"]
    assert capsys.readouterr().out.split() == [str(tmp_path / "plots" / name) for name in names]
    for name in names:
        assert (tmp_path / "plots" / name).read_bytes()[:4] == b"\x89PNG"
    assert main(["table", str(path), "--times", str(times)]) == 0
    assert "| 2 | 40 |" in capsys.readouterr().out
