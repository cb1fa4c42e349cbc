"""Training with a gate_gradient: the controller, and what it has to get on with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn

from triton_sparse_rnn import GateGradientSparsity, OneShot, Pruner, SparseGRU, SparseLSTM

CLASSES: list[Any] = [SparseLSTM, SparseGRU]
TEXT = "the quick brown fox jumps over the lazy dog and the dog sleeps on while the fox runs home. " * 40
ALPHABET = sorted(set(TEXT))


class CharacterModel(nn.Module):
    """Says which character comes next."""

    def __init__(self, layer_class: Any = SparseLSTM, hidden_size: int = 48, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET), 12)
        self.rnn = layer_class(12, hidden_size, **options)
        self.decoder = nn.Linear(hidden_size * (2 if self.rnn.bidirectional else 1), len(ALPHABET))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.rnn(self.embedding(tokens))[0])


def batch(step: int, T: int = 16, B: int = 12) -> tuple[Tensor, Tensor]:
    codes = torch.tensor([ALPHABET.index(character) for character in TEXT])
    starts = torch.randint(len(codes) - T - 1, (B,), generator=torch.Generator().manual_seed(step))
    rows = torch.stack([codes[start : start + T + 1] for start in starts], dim=1)
    return rows[:-1], rows[1:]


def train(model: Any, steps: range, *, scale: float = 1.0, lr: float = 5e-3) -> list[float]:
    """Train by plain Adam and return the losses; a scaled loss is unscaled as a GradScaler would do it."""
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=lr), []
    for step in steps:
        tokens, wanted = batch(step)
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        (loss * scale).backward()
        for parameter in model.parameters():
            parameter.grad /= scale
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def make_model(gate_gradient: GateGradientSparsity | None, layer_class: Any = SparseLSTM, **options: Any) -> Any:
    torch.manual_seed(0)
    return CharacterModel(layer_class, gate_gradient=gate_gradient, **options)


def shares(model: Any) -> list[float]:
    return [share for gates in model.rnn.gate_gradient_stats.zeros.values() for share in gates.values()]


def reference(**arguments: Any) -> GateGradientSparsity:
    return GateGradientSparsity(backend="reference", **arguments)


class TestController:
    @pytest.mark.parametrize("layer_class", CLASSES)
    @pytest.mark.parametrize("rule", ["deterministic", "stochastic"])
    def test_holds_its_target_in_every_gate(self, layer_class, rule):
        model = make_model(reference(target=0.8, rule=rule), layer_class, num_layers=2)
        held: list[list[float]] = []
        for step in range(30):
            train(model, range(step, step + 1))
            held.append(shares(model))
        late = torch.tensor(held[12:])
        assert max(held[0]) < 0.1
        assert float((late.mean(0) - 0.8).abs().max()) < 0.05
        assert float((late - 0.8).abs().max()) < 0.2

    @pytest.mark.parametrize(("units", "rows"), [(8, 4), (48, 1)])
    def test_holds_its_target_of_blocks(self, units, rows):
        model = make_model(reference(target=0.6, structure="blocks", units=units, rows=rows))
        held = []
        for step in range(20):
            train(model, range(step, step + 1))
            held.append(sum(shares(model)) / 4)
        assert sum(held[5:]) / 15 == pytest.approx(0.6, abs=0.05)

    @pytest.mark.parametrize("power", [-12, 16])
    @pytest.mark.parametrize("rule", ["deterministic", "stochastic"])
    def test_is_invariant_to_the_scale_of_the_loss(self, rule, power):
        plain, scaled = (make_model(reference(target=0.7, rule=rule, dense_every=4)) for _ in range(2))
        assert train(plain, range(7)) == train(scaled, range(7), scale=2.0**power)
        assert plain.rnn.gate_gradient_stats == scaled.rnn.gate_gradient_stats
        for one, other in zip(plain.parameters(), scaled.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)

    def test_stochastic_zeroes_learn_as_well(self):
        dense, sparse = make_model(None), make_model(GateGradientSparsity(target=0.8, rule="stochastic"))
        dense_loss, sparse_loss = (sum(train(model, range(60))[-5:]) / 5 for model in (dense, sparse))
        assert sparse_loss < dense_loss + 0.25
        assert sparse.rnn.gate_gradient_stats.mean_redundant_macs > 0.45

    def test_first_gradients_that_are_not_finite(self):
        model = make_model(reference(target=0.8))
        start = model.rnn.gate_gradient_controller.state_dict()["log_thresholds"]
        tokens, wanted = batch(0)
        for _ in range(2):  # the first would set the thresholds, the second move them
            loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), wanted.flatten())
            (loss * torch.inf).backward()
            state = model.rnn.gate_gradient_controller.state_dict()
            assert torch.equal(state["log_thresholds"], start)
            assert not model.rnn.weight_hh_l0.grad.isfinite().any()
            assert max(shares(model)) < 0.1
        model.zero_grad()
        train(model, range(30))
        assert all(abs(share - 0.8) < 0.1 for share in shares(model))

    def test_nothing_arrives(self):
        model = make_model(reference(target=0.8))
        for _ in range(3):
            (model(batch(0)[0]) * 0).sum().backward()
        state = model.rnn.gate_gradient_controller.state_dict()
        assert torch.equal(state["log_thresholds"], torch.full((1, 4), -3.0))
        assert shares(model) == [1.0] * 4


class TestTogether:
    @pytest.mark.parametrize("layer_class", CLASSES)
    def test_pruner(self, layer_class):
        model = make_model(GateGradientSparsity(target=0.8), layer_class)
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        pruner = Pruner(model, OneShot(sparsity=0.75, step=2), pattern=(4, 1))
        pruner.attach(optimizer)
        for step in range(8):
            tokens, wanted = batch(step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(tokens).flatten(0, 1), wanted.flatten()).backward()
            optimizer.step()
        for name, mask in pruner.masks.items():
            weight = model.get_parameter(name)
            assert not weight[~mask].any()
            assert not weight.grad[~mask].any()
            assert float((weight == 0).float().mean()) == pytest.approx(0.75, abs=0.01)
        assert 0.6 < min(shares(model)) <= max(shares(model)) < 0.95

    def test_grad_scaler_skips_what_is_not_finite(self):
        model = make_model(reference(threshold=0.0))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=100)
        model.rnn.gate_gradient = reference(threshold=1e-4, loss_scale=scaler.get_scale)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(4):
            tokens, wanted = batch(step)
            loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), wanted.flatten())
            before = model.rnn.weight_hh_l0.detach().clone()
            optimizer.zero_grad()
            scaler.scale(loss * (torch.inf if step == 2 else 1.0)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(before, model.rnn.weight_hh_l0) == (step == 2)
            assert scaler.get_scale() == (2.0**8 if step < 2 else 2.0**7)
            assert min(shares(model)) > 0.01 if step != 2 else max(shares(model)) < 0.01

    def test_accumulated_backwards(self):
        whole, halves = (make_model(reference(threshold=0.01)) for _ in range(2))
        (tokens, _), parts = batch(0, B=8), (slice(0, 4), slice(4, 8))
        whole(tokens).sin().sum().backward()
        for part in parts:
            halves(tokens[:, part]).sin().sum().backward()
        for one, other in zip(whole.parameters(), halves.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)
        assert halves.rnn.gate_gradient_stats.steps == 2
        for gate, share in whole.rnn.gate_gradient_stats.zeros["l0"].items():
            assert halves.rnn.gate_gradient_stats.mean_zeros["l0"][gate] == pytest.approx(share, abs=1e-3)


def train_on_rank(rank: int, folder: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = make_model(reference(target=0.7, rule="stochastic", seed=rank), num_layers=2)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.Adam(wrapped.parameters(), lr=5e-3)
    for step in range(6):
        tokens, wanted = batch(2 * step + rank)
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(tokens).flatten(0, 1), wanted.flatten()).backward()
        optimizer.step()
    state = model.rnn.gate_gradient_controller.state_dict()
    result = {"model": model.state_dict(), "gate_gradient": state, "zeros": shares(model)}
    torch.save(result, folder / f"rank{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="this torch is built without torch.distributed")
def test_distributed_data_parallel(tmp_path):
    spawn(train_on_rank, args=(tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])
    for rank in (first, second):
        assert all(abs(share - 0.7) < 0.25 for share in rank["zeros"])
        assert rank["gate_gradient"]["steps"].tolist() == [6, 6]
    thresholds = [rank["gate_gradient"]["log_thresholds"] for rank in (first, second)]
    assert not torch.equal(*thresholds)  # each its own
