"""The evidence for zeroed gate gradients: tiny runs, and tables and plots of numbers that are made up."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from studies.gate_gradients.distribution import GATES, Probe, describe, threshold_for
from studies.gate_gradients.rows import DENSE, ROWS
from studies.gate_gradients.study import GATE_GRADIENTS, RECORDS
from studies.gate_gradients.training import recurrent_share, zeros_over_time
from studies.runs.records import Key
from studies.runs.study import Place
from studies.tasks.characters import Characters
from triton_sparse_rnn import GateGradientSparsity, GateGradientStats, SparseLSTM

NAMES = {row.name: row for row in ROWS}
BACKEND = {"backend": "reference"}  # compiles nothing


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def task(text):
    return Characters(text, embedding_size=5, hidden_size=17, batch_size=3, window=6, scored=100)


def run(task, row, seed, steps, path=Path(), on_step=lambda loss: None):
    key = Key("characters", row.name, seed, steps)
    return GATE_GRADIENTS.run(task, row, key, Place(path, Path()), on_step)


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


# Rows and single runs


def test_rows():
    headline = GATE_GRADIENTS.rows("headline")
    assert headline[0] is ROWS[0] is DENSE
    assert [row.name for row in headline[1:]] == [
        f"{rule}, {percent} %" for rule in ("deterministic", "stochastic") for percent in (80, 85, 90)
    ]
    assert {row.seeds for row in headline} == {(0, 1, 2)}
    assert {row.seeds for row in ROWS if row not in headline} == {(0,)}


@pytest.mark.parametrize("row", [row for row in ROWS if not row.is_dense], ids=lambda row: row.name)
def test_every_row_is_accepted(row):
    arguments = row.gate_gradient(seed=0, steps=100, loss_scale=0.5, thresholds={0.5: 1.0, 0.8: 2.0, 0.9: 3.0})
    SparseLSTM(3, 32, gate_gradient=GateGradientSparsity(**arguments))
    assert arguments.get("end_step") == (70 if row.dense_end else None)


def test_a_dense_run_is_that_of_torch(task):
    found = run(task, DENSE, 0, 4)
    model = task.build_model(nn.LSTM, 0)
    optimizer = torch.optim.Adam(model.parameters())
    losses = []
    for loss, step in zip(task.losses(model, 0), range(4), strict=False):
        optimizer.param_groups[0]["lr"] = task.learning_rate(step, 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert found["training_loss"] == losses
    assert found["quality"] == task.evaluate(model.eval(), "validation")
    assert found["zeros"] == {}
    assert found["redundant_macs"] == {"rnn": 0, "model": 0}
    assert set(found["distribution"]) == {"early", "late"}
    assert run(task, DENSE, 1, 2)["distribution"] == {}
    json.dumps(found)


def test_a_sparse_run_counts_what_became_redundant(task):
    seen = []
    found = run(task, plain(NAMES["deterministic, 80 %"]), 2, 12, on_step=seen.append)
    mean = sum(shares["mean"] for shares in found["zeros"].values()) / 4
    assert len(seen) == 12
    assert set(found["zeros"]) == set(GATES)
    assert 0.5 < mean < 0.9
    assert found["redundant_macs"]["rnn"] == pytest.approx(2 / 3 * mean)
    V, H, I = task.text.symbols, 17, 5
    assert found["redundant_macs"]["model"] / found["redundant_macs"]["rnn"] == pytest.approx(
        4 * H * (I + H) / (4 * H * (I + H) + H * V)
    )
    assert found["gate_gradient"] == {"target": 0.8, "rule": "deterministic", "backend": "reference", "seed": 2}


def test_a_fixed_threshold_is_that_quantile_of_the_dense_run_in_the_file(task, tmp_path):
    task = dataclasses.replace(task, window=1)  # nothing comes from later steps, so that it holds exactly
    path, row = tmp_path / "runs.jsonl", plain(NAMES["fixed threshold, about 80 %"])
    dense = run(task, DENSE, 0, 1)
    RECORDS.append(path, dense | {"steps": 9})
    with pytest.raises(ValueError, match="needs the dense run of seed 0"):
        run(task, row, 0, 1, path)
    RECORDS.append(path, dense)
    found = run(task, row, 0, 1, path)
    assert sum(shares["mean"] for shares in found["zeros"].values()) / 4 == pytest.approx(0.8, abs=0.01)
    assert found["gate_gradient"]["threshold"] == dense["distribution"]["early"]["quantiles"]["0.8"] / task.loss_scale
    assert found["gate_gradient"]["loss_scale"] == 1 / 3


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
