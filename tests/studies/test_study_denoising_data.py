"""What a denoiser is trained on and judged by: signals, speech, noise."""

import math
import sys
import types
import wave

import numpy as np
import pytest
import torch

from studies.denoising import noise as noise_module
from studies.denoising import speech
from studies.denoising.noise import KINDS, held_out_pairs, mix, training_batch
from studies.denoising.signals import BINS, HOP, WINDOW, features, si_sdr_db, spectrum, waveform
from studies.denoising.speech import GROUPS, Speech
from studies.tasks.task import MissingDataError

pytestmark = pytest.mark.usefixtures("one_thread")

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


def test_missing_recordings_are_said(recordings, monkeypatch):
    def message():
        with pytest.raises(MissingDataError) as caught:
            Speech.load(recordings / "m" / "speech.safetensors")
        return str(caught.value)

    write_wav(recordings / "pocketsphinx" / "c.wav", [1], rate=8000)
    assert "16 kHz, got (8000, 2, 1)" in message()
    monkeypatch.setattr(speech, "POCKETSPHINX", recordings / "nowhere")
    assert "apt-get install pocketsphinx-testdata" in message()
    monkeypatch.setattr(speech, "ASTERISK", recordings / "nowhere")
    assert "apt-get install asterisk-core-sounds-en-g722" in message()
    monkeypatch.setitem(sys.modules, "G722", None)
    assert "pip install G722" in message()
    assert not (recordings / "m" / "speech.safetensors").exists()
