"""How a denoiser is fine-tuned, pruned and taught, on a tiny one."""

import copy
import dataclasses
import math

import pytest
import torch

from studies.denoising import training
from studies.denoising.model import Denoiser
from studies.denoising.noise import Pair, mix
from studies.denoising.rows import BLOCKS, DENSE, ROWS, Row
from studies.denoising.signals import BINS, features, spectrum
from studies.denoising.study import DENOISING
from studies.denoising.training import Settings, fine_tune, multiplies_bfloat16, relative_distance, spectral_loss
from studies.tasks.task import straight_rate
from triton_sparse_rnn import Picks

HIDDEN, WIDE = 48, 64  # in whole blocks
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return Denoiser(HIDDEN, WIDE).eval()


def test_the_loss_is_what_its_definition_says():
    clean, noise = torch.randn(2, 1, 1000)
    pair = mix(clean, noise, 3.0, -20.0)
    pair = Pair(torch.cat([pair.noisy, 5 * pair.noisy]), torch.cat([pair.clean, 5 * pair.clean]))
    gains = torch.rand(1, len(spectrum(pair.noisy)[0]), BINS).expand(2, -1, -1)
    scale = pair.clean.square().mean(-1, keepdim=True).sqrt()
    X, S = gains * spectrum(pair.noisy / scale), spectrum(pair.clean / scale)
    magnitudes = (S.abs() ** 0.3 - X.abs() ** 0.3).square().mean()
    spectra = (torch.polar(S.abs() ** 0.3, S.angle()) - torch.polar(X.abs() ** 0.3, X.angle())).abs().square().mean()
    assert spectral_loss(gains, pair).item() == pytest.approx((0.7 * magnitudes + 0.3 * spectra).item(), rel=1e-3)
    assert spectral_loss(torch.ones_like(gains), Pair(pair.clean, pair.clean)) < 1e-6
    zeros = torch.zeros_like(gains, requires_grad=True)
    spectral_loss(zeros, pair).backward()
    assert zeros.grad is not None
    assert zeros.grad.isfinite().all()


def test_bfloat16_is_used_where_the_processor_has_instructions_for_it(monkeypatch):
    for instructions, has_it in ((["avx2", "avx512f"], False), (["avx512f", "avx512_bf16"], True)):
        monkeypatch.setattr(training, "describe_processor", lambda found=instructions: {"vector_instructions": found})
        assert multiplies_bfloat16() is Settings().bfloat16 is has_it
        assert Settings(bfloat16=not has_it).bfloat16 is not has_it


TINY = Settings(steps=4, batch_size=2, seconds=0.1)


@pytest.mark.parametrize(
    ("row", "gru", "linear"),
    [
        (DENSE, 0.0, 0.0),
        (Row("a", 0.75), 0.75, 0.0),
        (Row("b", 0.5, gradual=False), 0.5, 0.0),
        (Row("c", 0.75, linear_too=True), 0.75, 0.75),
        (Row("d", 0.75, pattern=BLOCKS, linear_too=True), 0.75, 0.75),
        (Row("e", 0.75, taught=True, held=0.5), 0.75, 0.0),
    ],
)
def test_fine_tuning_prunes(tiny, talk, row, gru, linear):
    before = {name: weight.clone() for name, weight in tiny.state_dict().items()}
    teacher = Denoiser(HIDDEN, WIDE).eval() if row.taught else None
    losses = fine_tune(tiny, row, talk, 0, TINY, teacher=teacher)
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))
    assert not tiny.training
    for name, weight in tiny.state_dict().items():
        assert not torch.equal(weight, before[name])
        if "weight" in name:
            zeros = (weight == 0).float().mean().item()
            assert zeros == pytest.approx(gru if name.startswith("rnn") else linear, abs=0.05), name
            if zeros and len(weight) % 16 == 0:
                rows = (weight == 0).view(-1, 16, weight.shape[1])
                assert (rows == rows[:, :1]).all() == (row.pattern == BLOCKS), name


def test_fine_tuning_depends_on_its_seed_alone(talk):
    def tuned(seed):
        torch.manual_seed(0)
        model = Denoiser(HIDDEN, WIDE)
        torch.manual_seed(seed + 9)  # must not count
        return fine_tune(model, Row("a", 0.5), talk, seed, TINY), model.rnn.weight_hh_l1

    (losses, weight), (same_losses, same_weight), (other_losses, _) = tuned(1), tuned(1), tuned(2)
    assert losses == same_losses
    assert torch.equal(weight, same_weight)
    assert losses != other_losses


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.0, 3.0), (2.0, 0.0)])
def test_a_teacher_adds_distances_of_layers_and_gains_to_the_loss(tiny, talk, bfloat16, weights):
    torch.manual_seed(1)
    teacher = Denoiser(HIDDEN, WIDE).eval()
    with torch.no_grad():
        teacher.state_dict()["fc_out.4.weight"].mul_(20)  # gains that differ
    kept = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    layers, gains = weights
    settings = dataclasses.replace(TINY, steps=1, bfloat16=bfloat16, layers_weight=layers, gains_weight=gains)
    pair = next(training._batches(talk, 0, settings))

    def said(model):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            x = model.fc_in(features(spectrum(pair.noisy)))
            y = model.rnn(x)[0]
            return y.float(), model.fc_out(y).float()

    (y, ours), (y_teacher, theirs) = said(tiny), said(teacher)
    of_layers = ((y - y_teacher).square().sum() / y_teacher.square().sum()).item()
    of_gains = ((ours - theirs).square().sum() / theirs.square().sum()).item()
    assert min(of_layers, of_gains) > 1e-2
    alone = copy.deepcopy(tiny)
    (untaught,) = fine_tune(alone, Row("a"), talk, 0, settings)
    (taught,) = fine_tune(tiny, Row("b", taught=True), talk, 0, settings, teacher=teacher)
    assert taught - untaught == pytest.approx(layers * of_layers + gains * of_gains, rel=1e-2 if bfloat16 else 1e-4)
    assert not torch.equal(tiny.fc_in[0].weight, alone.fc_in[0].weight)
    assert not any(module._forward_hooks for module in tiny.modules())
    assert not teacher.training
    assert all(torch.equal(weight, kept[name]) for name, weight in teacher.state_dict().items())
    assert all(weight.grad is None for weight in teacher.parameters())


def test_a_relative_distance():
    taught = torch.tensor([3.0, 4.0])
    assert relative_distance(taught, taught) == 0
    assert relative_distance(torch.zeros(2), taught) == 1
    assert relative_distance(taught + 1, taught).item() == pytest.approx(2 / 25)


@pytest.mark.parametrize("held", [0.0, 0.5])
def test_the_rate_is_held(tiny, talk, held, monkeypatch):
    rates = []

    class Watched(torch.optim.Adam):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    fine_tune(tiny, Row("a", peak_rate=1e-3, held=held), talk, 0, dataclasses.replace(TINY, steps=8))
    assert rates == pytest.approx([1e-3 * straight_rate(step, 8, TINY.warmup, held) for step in range(8)])
    assert (rates[1] == rates[3]) == (held > 0)


def test_rows():
    names = [row.name for row in DENOISING.rows()]
    assert names[:4] == ["noisy", "original", "dense", "50 %"]  # what teaches comes before what is taught
    assert len(names) == len(set(names)) == 15
    assert DENSE.held == 0
    for row in ROWS:
        assert ("blocks" in row.name) == (row.pattern == BLOCKS)
        assert row.taught == row.begins_dense == (row != DENSE and "blocks" not in row.name and "not" not in row.name)
        assert row.held == (0.5 if row != DENSE and row.pattern == Picks() else 0)
        assert row.settings()["pattern"] == (repr(row.pattern) if row.sparsity else None)


@pytest.mark.parametrize("steps", [1, 2, 7, 800])
def test_every_schedule_ends_within_its_steps(steps):
    for row in ROWS:
        schedule = row.schedule(steps)
        if schedule is None:
            assert row == DENSE
            continue
        assert schedule.last_step <= steps
        assert schedule.sparsity_at(schedule.last_step) == pytest.approx(row.sparsity)
