import copy
from typing import Any

import pytest
import torch
from torch import nn

from triton_sparse_rnn.pruning import ConstantMask, OneShot, PolynomialDecay, Pruner, ThresholdRamp, forecast
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.picks import Picks

STEPS = 120


class Model(nn.Module):
    """Predicts the next number of a sum of two waves."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.rnn = nn.GRU(4, 45)
        self.head = nn.Linear(45, 4)

    def loss(self, seed):
        phases = 6 * torch.rand(1, 8, 4, generator=torch.Generator().manual_seed(seed))
        time = torch.arange(13.0)[:, None, None]
        wave = torch.sin(0.7 * time + phases) + torch.sin(1.9 * time + 2 * phases)
        return (self.head(self.rnn(wave[:-1])[0]) - wave[1:]).square().mean()


def train(model, pruner=None):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    if pruner is not None:
        pruner.attach(optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        model.loss(step).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": (16, 1)},
        {"pattern": (7, 2), "tie_gates": True},
        {"pattern": Picks()},
        {"pattern": Picks(7, 16, 2), "balanced": False, "tie_gates": True},
        {"pattern": (1, 1), "balanced": True},
        {"pattern": Picks(4, 8)},
        {"pattern": Picks(16, 32, 2)},
        {"targets": {"*ih*": {"n": None, "z": OneShot(sparsity=0.5, step=30)}}},
    ],
    ids=str,
)
def test_schedules_by_rank_are_known_in_advance(options):
    model = Model()
    schedule = PolynomialDecay(final_sparsity=0.85, begin_step=20, end_step=90, frequency=10)
    pruner = Pruner(model, schedule, **options)
    predicted = forecast(model, pruner)
    assert pruner.sparsity == 0
    train(model, pruner)
    assert [row.name for row in predicted.rows] == list(pruner.masks)
    for row in predicted.rows:
        weight = model.get_parameter(row.name).detach()
        stored = BlockMatrix.from_dense(weight, pruner.pattern, gates=3)
        assert (row.stored_units, row.nbytes) == (len(stored.values), stored.nbytes)
        assert row.macs_per_step == stored.values.numel()
        assert row.dense_nbytes == weight.nbytes
        assert row.sparsity == pytest.approx(pruner.sparsities[row.name], abs=0.02)  # edge blocks hold fewer weights
    assert predicted.sparsity == pytest.approx(pruner.sparsity, abs=0.02)
    assert predicted.nbytes == sum(row.nbytes for row in predicted.rows)


@pytest.mark.parametrize("block_size", [(1, 1), (5, 1)])
def test_a_threshold_ramp_is_taken_to_end_where_the_reference_does(block_size):
    dense, model = train(Model(seed=1)), Model(seed=2)
    ramp = ThresholdRamp.from_weights(dense, 0.8, pattern=block_size, begin_step=1, ramp_step=50, end_step=100)
    pruner = Pruner(model, ramp, pattern=block_size)
    predicted = forecast(model, pruner, dense)
    assert predicted.sparsity == pytest.approx(0.8, abs=0.005)
    assert forecast(model, pruner, dense.state_dict()) == forecast(dense, pruner) == predicted


def test_a_threshold_ramp_ends_near_its_forecast():
    dense = train(Model())
    span: dict[str, Any] = {"begin_step": 10, "ramp_step": 40, "end_step": 100, "frequency": 6}
    targets = {
        names: ThresholdRamp.from_weights(dense, 0.85, names=names, pattern=(1, 1), **span)
        for names in ("*weight_ih*", "*weight_hh*")
    }
    model = Model()
    pruner = Pruner(model, None, targets=targets, pattern=(1, 1))
    predicted = forecast(model, pruner, dense)
    train(model, pruner)
    assert predicted.sparsity == pytest.approx(pruner.sparsity, abs=0.05)


def test_constant_mask_is_read_off_the_model():
    model = Model()
    train(model, Pruner(model, OneShot(sparsity=0.6, step=3)))
    zeros = sum((model.get_parameter(f"rnn.weight_{kind}_l0") == 0).sum().item() for kind in ("ih", "hh"))
    predicted = forecast(model, Pruner(model, ConstantMask()), reference=Model(seed=5))
    assert sum(row.zeros for row in predicted.rows) == zeros > 0


def test_nothing_changes():
    model = Model()
    reference = copy.deepcopy(model)
    pruner = Pruner(model, PolynomialDecay(initial_sparsity=0.1, final_sparsity=0.5, begin_step=0, end_step=9))
    random_state = torch.get_rng_state()
    forecast(model, pruner, reference)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (pruner.sparsity, pruner.step_count) == (0, 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


def test_table_lines_up():
    layer = nn.LSTM(40, 80)
    text = str(forecast(layer, Pruner(layer, OneShot(sparsity=0.9, step=1), pattern=Picks(), targets={"*ih*": None})))
    lines = text.splitlines()
    assert [line.split()[0] for line in lines] == ["weight", "weight_hh_l0", "total"]
    assert (
        lines[1].split()[1:]
        == lines[2].split()[1:]
        == ["90.0%", *["160", "picked", "units", "of", "16x1", "in", "32", "13,768", "102,400", "2,560"]]
    )
    assert len({len(line) for line in lines}) == 1


def test_references_that_do_not_fit_are_named():
    layer = nn.GRU(4, 8)
    pruner = Pruner(layer, OneShot(sparsity=0.5, step=1))
    with pytest.raises(ValueError, match="reference lacks weight_ih_l0"):
        forecast(layer, pruner, nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"reference has weight_ih_l0 of shape \(24, 5\), expected \(24, 4\)"):
        forecast(layer, pruner, nn.GRU(5, 8).state_dict())
    with pytest.raises(ValueError, match="model lacks weight_ih_l0"):
        forecast(nn.Sequential(layer), pruner)
    with pytest.raises(TypeError, match=r"reference must be an nn\.Module or a state_dict, got str"):
        forecast(layer, pruner, "dense.pt")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pruner must be a Pruner, got int"):
        forecast(layer, 3)  # type: ignore[arg-type]
