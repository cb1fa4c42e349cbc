"""The task of the evidence that listens, on tones instead of voices."""

import dataclasses
import itertools
import json
import math
import wave

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from studies.tasks import sounds
from studies.tasks.sounds import VOICES, Recording, Sounds
from studies.tasks.task import MissingDataError
from studies.tasks.teacher import Teacher
from triton_sparse_rnn import SparseGRU, SparseLSTM, to_sparse

pytestmark = pytest.mark.usefixtures("one_thread")

SECONDS = 0.8
SPLITS = ("train", "validation", "test")


def tone(hertz, seconds=SECONDS, amplitude=10_000):
    """Return int16 samples [N]; a multiple of 100 Hz is at the same phase wherever a window may begin."""
    time = torch.arange(round(seconds * sounds.RATE), dtype=torch.float64) / sounds.RATE
    return (amplitude * torch.sin(2 * math.pi * hertz * time)).round().short()


def tones(*names):
    """Each voice sings its own note."""
    return [Recording(voice, name, tone(300 * (1 + voice))) for voice in range(len(VOICES)) for name in names]


def write(path, samples, *, channels=1, rate=sounds.RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.numpy().astype("<i2").tobytes())


@pytest.fixture
def splits(monkeypatch):
    """Decide by name what is not for training; a few windows at once are enough."""
    names = {"bye": "validation", "ciao": "test"}
    monkeypatch.setattr(sounds, "split_of_prompt", lambda name: names.get(name, "train"))
    monkeypatch.setattr(sounds, "HEARD_AT_ONCE", 40)


@pytest.fixture
def task(splits):
    return Sounds.of(tones("hello", "bye", "ciao"), held_out_batches=2, hidden_size=16, batch_size=10)


# What is read, and how it is split


def test_speech_is_read_and_the_rest_is_not(tmp_path, splits):
    for voice in VOICES:
        for name in ("bye", "ciao", "hello", "letters/a", "at-tone-time-exactly", "tt-monkeysintro"):
            write(tmp_path / voice / f"{name}.wav", tone(1000, amplitude=len(name)))
        for name in ("silence/1", "beep", "beeperr", "descending-2tone", "tt-monkeys"):
            write(tmp_path / voice / f"{name}.wav", tone(1000))
        (tmp_path / voice / "hello.g722").write_bytes(b"\0")
    recordings = sounds.read(tmp_path)
    names = ["at-tone-time-exactly", "bye", "ciao", "hello", "letters/a", "tt-monkeysintro"]
    assert [(one.voice, one.name) for one in recordings] == list(itertools.product(range(5), names))
    assert torch.equal(recordings[3].samples, tone(1000, amplitude=5))

    task = Sounds.load(tmp_path)
    learned = [one.samples for one in recordings if one.name not in ("bye", "ciao")]
    assert torch.equal(task.train.samples, torch.cat(learned))
    before = task.sha256
    assert Sounds.load(tmp_path).sha256 == before
    write(tmp_path / VOICES[4] / "hello.wav", tone(1000, amplitude=6))
    assert Sounds.load(tmp_path).sha256 != before


@pytest.mark.parametrize("form", [{"channels": 2}, {"rate": 16_000}])
def test_other_recordings_are_refused(tmp_path, form):
    write(tmp_path / VOICES[1] / "hello.wav", tone(1000), **form)
    with pytest.raises(ValueError, match=r"hello.wav must have 1 channel, 2 bytes a sample, 8000 Hz"):
        sounds.read(tmp_path)


def test_missing_sounds_are_said(tmp_path):
    with pytest.raises(MissingDataError, match=r"apt-get install asterisk-core-sounds-en-wav .*-ru-wav"):
        Sounds.load(tmp_path)
    recordings = [one for one in tones("hello") if one.voice != 2]
    with pytest.raises(MissingDataError, match="too few recordings of fr_CA_f_June;"):
        sounds.join([*recordings, Recording(2, "hello", tone(500, seconds=0.5))])


def test_families_are_not_divided():
    families = [
        ["vm-message", "vm-messages", "vm-messagex1"],
        ["conf-muted", "confbridge-muted", "conf-now-muted"],
        ["vm-tempgreeting", "vm-tempgreeting2"],
        ["confbridge-begin-glorious-a", "confbridge-begin-glorious-b"],
        ["digits/1", "digits/1M", "digits/21", "digits/h-20", "letters/a", "letters/aa"],
        ["minutes", "queue-minute", "vm-minutes", "digits/minutes"],
    ]
    assert all(len({sounds.split_of_prompt(name) for name in family}) == 1 for family in families)
    many = [sounds.split_of_prompt(f"vm-{a}{b}{c}") for a, b, c in itertools.product("abcdefghijkl", repeat=3)]
    assert all(0.13 < many.count(split) / len(many) < 0.17 for split in ("validation", "test"))


def test_windows_lie_within_recordings_and_where_there_is_sound():
    pause = torch.zeros(2 * sounds.WINDOW, dtype=torch.int16)
    loud, quiet = tone(1000), tone(1000, amplitude=1_000)
    speech = sounds.join(
        [
            Recording(0, "short", loud[: sounds.WINDOW - 1]),
            Recording(0, "exact", loud[: sounds.WINDOW]),
            Recording(0, "nothing", loud[:0]),
            Recording(0, "silent", pause),
            Recording(0, "paused", torch.cat([loud, pause, quiet])),
            *tones("hello")[1:],
        ]
    )
    assert speech.windows.tolist()[1:] == [1 + (len(loud) - sounds.WINDOW) // sounds.GRID] * 4
    exact, *paused = speech.starts[: speech.windows[0]].tolist()
    begin = 2 * sounds.WINDOW - 1 + len(pause)
    assert exact == sounds.WINDOW - 1
    assert paused == [*range(begin, begin + len(paused) * sounds.GRID, sounds.GRID)]
    power = loud.double().square().mean() * len(loud) + quiet.double().square().mean() * len(quiet)
    threshold = power / (len(loud) + len(pause) + len(quiet)) / 2
    heard = begin + len(loud) - paused[-1]  # samples of the last window before the pause
    assert heard / sounds.WINDOW * loud.double().square().mean() >= threshold
    assert (heard - sounds.GRID) / sounds.WINDOW * loud.double().square().mean() < threshold


# What is heard


def test_noise_is_so_many_decibels_below():
    time = torch.arange(800) * 2 * math.pi / 800
    signal, noise = 7 * torch.sin(3 * time), 0.1 * torch.sin(5 * time)
    mixed = sounds.mix(signal.expand(2, -1), noise.expand(2, -1), torch.tensor([[6.0], [-20.0]]))
    assert mixed.square().mean(1).tolist() == pytest.approx([1, 1])
    powers = (mixed @ signal / signal.norm()).square() / (mixed @ noise / noise.norm()).square()
    assert (10 * powers.log10()).tolist() == pytest.approx([6, -20], abs=1e-4)


@pytest.mark.parametrize("bin_", [10, 47, 100])
def test_a_sine_is_in_its_band(bin_):
    hertz = bin_ * sounds.RATE / sounds.FRAME
    sine = torch.sin(2 * math.pi * hertz * torch.arange(sounds.WINDOW) / sounds.RATE)
    heard = sounds.log_mel(torch.stack([sine, 10 * sine]))
    assert heard.shape == (1 + (sounds.WINDOW - sounds.FRAME) // sounds.HOP, 2, sounds.BANDS)
    mel = 2595 * math.log10(1 + hertz / 700)
    width = 2595 * math.log10(1 + sounds.RATE / 2 / 700) / (sounds.BANDS + 1)
    assert set(heard[:, 0].argmax(1).tolist()) == {round(mel / width) - 1}
    # Through Hann's window the spectrum of a sine of amplitude 1 is FRAME / 4 at its frequency, half of it beside.
    line = torch.zeros(1 + sounds.FRAME // 2)
    line[bin_ - 1 : bin_ + 2] = torch.tensor([0.25, 1, 0.25]) * (sounds.FRAME / 4) ** 2
    expected = (sounds.mel_bands() @ line).log()
    near = expected > 0
    torch.testing.assert_close(heard[:, 0, near], expected[near].expand(len(heard), -1), rtol=0, atol=1e-3)
    torch.testing.assert_close(
        heard[:, 1, near] - heard[:, 0, near], torch.tensor(math.log(100)).expand(len(heard), int(near.sum()))
    )


def test_bands_cover_all_frequencies_alike():
    bands = sounds.mel_bands()
    first, last = int(bands[0].argmax()), int(bands[-1].argmax())
    torch.testing.assert_close(bands.sum(0)[first + 1 : last], torch.ones(last - first - 1))
    assert bands.amax(1).min() > 0.2


def test_every_voice_is_heard_as_itself(monkeypatch):
    monkeypatch.setattr(sounds, "SIGNAL_TO_NOISE", (60.0, 60.0))
    speech = sounds.join(tones("hello"))
    features, voices = sounds.examples(speech, 100, torch.Generator().manual_seed(3))
    assert set(voices.tolist()) == set(range(5))
    alone = [sounds.log_mel(sounds.unit_power(tone(300 * (1 + voice))[None].float())).argmax(2) for voice in range(5)]
    assert all(
        set(features[:, k].argmax(1).tolist()) <= set(alone[voice].unique().tolist()) for k, voice in enumerate(voices)
    )


def test_examples_are_mixed_with_voices_and_noise(monkeypatch):
    monkeypatch.setattr(sounds, "log_mel", lambda windows: windows)
    seen = {}
    monkeypatch.setattr(
        sounds, "mix", lambda signal, noise, decibel: seen.update(noise=noise, decibel=decibel) or signal
    )
    sounds.examples(sounds.join(tones("hello")), 200, torch.Generator().manual_seed(3))
    low, high = sounds.SIGNAL_TO_NOISE
    assert low < seen["decibel"].min() < low + 1
    assert high - 1 < seen["decibel"].max() < high
    noise = sounds.unit_power(seen["noise"])
    notes = torch.stack([tone(300 * (1 + voice))[: sounds.WINDOW] for voice in range(5)]).float()
    sung = (noise @ F.normalize(notes).t()).square().sum(1) / sounds.WINDOW  # share of the power that is voices
    assert sung.min() < 0.1
    assert sung.max() > 0.9


# What is learned


@pytest.mark.parametrize("make_rnn", [nn.LSTM, SparseGRU])
def test_tones_are_learned(task, learn, make_rnn):
    model = task.build_model(make_rnn, 0)
    before = task.evaluate(model.eval(), "test")
    learn(task, model.train(), 25, 0.02)
    after = task.evaluate(model.eval(), "test")
    assert list(after) == [metric.key for metric in task.metrics]
    assert after["nats"] < 0.5 * before["nats"]
    assert after["error_percent"] < 20


@pytest.mark.parametrize("split", ["validation", "test"])
def test_errors_are_counted(task, split):
    voices = torch.cat([voices for _, voices in getattr(task, split)])
    settings = task.settings()
    assert len(voices) == settings["windows_held_out"] == 80
    assert json.loads(json.dumps(settings)) == settings
    answers = iter(F.one_hot(voices * (voices != 3), 5).float().split(40))
    model = nn.Module()
    model.forward = lambda features: next(answers)
    wrong = (voices == 3).sum().item()
    found = task.evaluate(model, split)
    assert found["error_percent"] == pytest.approx(100 * wrong / 80)
    assert found["nats"] == pytest.approx(math.log(math.e + 4) - 1 + wrong / 80, rel=1e-5)


def test_held_out_examples_are_the_same_and_seeds_differ(task):
    again = Sounds.of(tones("hello", "bye", "ciao"), held_out_batches=2)
    for held_out, same in ((task.validation, again.validation), (task.test, again.test)):
        assert all(torch.equal(a, b) for a, b in zip(held_out[1], same[1], strict=True))
        assert not torch.equal(held_out[0].features, held_out[1].features)
    assert not torch.equal(task.validation[0].features, task.test[0].features)
    model = task.build_model(nn.GRU, 0)

    def losses(seed):
        return [loss.item() for loss in itertools.islice(task.losses(model, seed), 3)]

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


def test_features_are_normalised(task):
    features = sounds.examples(task.train, 200, torch.Generator().manual_seed(5)).features
    model = task.build_model(nn.GRU, 0)
    model.rnn.register_forward_pre_hook(lambda module, inputs: heard.extend(inputs))
    heard = []
    model(features)
    assert heard[0].mean((0, 1)).abs().max() < 0.5
    assert heard[0].std((0, 1)).log().abs().max() < 0.5


def test_a_teacher_adds_to_the_loss(task):
    model, trained = (dataclasses.replace(task, hidden_size=size).build_model(nn.GRU, size) for size in (4, 8))
    own = next(task.losses(model, 5))
    both = next(task.losses(model, 5, Teacher(model, trained.eval(), outputs=0.5)))
    features, _ = sounds.examples(task.train, task.batch_size, torch.Generator().manual_seed(5))
    wanted, scores = trained(features).softmax(1), model(features).log_softmax(1)
    distance = (wanted * (wanted.log() - scores)).sum() * task.loss_scale
    assert both.item() == pytest.approx((own + 0.5 * distance).item(), rel=1e-5)
    assert distance > 0
    both.backward()
    assert all(parameter.grad is None for parameter in trained.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_converted_models_are_evaluated(task):
    model = task.build_model(SparseLSTM, 0).eval()
    for weight in (model.rnn.weight_ih_l0, model.rnn.weight_hh_l0):
        weight.data[:, 3:] = 0
    converted = task.evaluate(to_sparse(model, backend="reference"), "test")
    assert converted["nats"] == pytest.approx(task.evaluate(model, "test")["nats"], rel=1e-5)


@pytest.mark.slow("studies")
def test_the_recordings():
    if not sounds.ROOT.exists():
        pytest.skip(sounds.INSTALL)
    recordings = sounds.read(sounds.ROOT)
    splits = {split: [one for one in recordings if sounds.split_of_prompt(one.name) == split] for split in SPLITS}
    for split in ("validation", "test"):
        assert 0.05 < len(splits[split]) / len(recordings) < 0.2  # numbers and letters are all in one
        assert sounds.join(splits[split]).windows.min() > 8_000
    for get in (lambda one: one.name, lambda one: one.samples.numpy().tobytes()):
        parts = [{get(one) for one in part} for part in splits.values()]
        assert len(set.union(*parts)) == sum(map(len, parts))
    assert len(Sounds.load().test) == 8
