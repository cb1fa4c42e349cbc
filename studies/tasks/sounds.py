"""Which language is spoken: half a second of a telephone prompt among other voices and noise, heard as it comes.

The recordings are the spoken prompts of a telephone exchange, the same sentences in five languages, 8 kHz, from Debian.
A recurrent net in one direction reads log-mel features, as in keyword spotting.

A limit of these data: each language has one speaker, whose voice tells the language as well as the words do. Only
English and Spanish are spoken by the same person. Errors tell how well a model hears, not how well it would know the
language of a stranger.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import wave
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from studies.tasks.task import HeldOut, MakeRNN, Metric, MissingDataError, Task, numbers_of, split_of
from studies.tasks.teacher import Teacher

ROOT = Path("/usr/share/asterisk/sounds")
VOICES = ("en_US_f_Allison", "es_MX_f_Allison", "fr_CA_f_June", "it_IT_m_Carlo", "ru_RU_f_IvrvoiceRU")
INSTALL = "apt-get install " + " ".join(f"asterisk-core-sounds-{voice[:2]}-wav" for voice in VOICES)
NOT_SPEECH = re.compile(r"silence/|beep|.*(tone|monkeys)$")
HELD_OUT = 0.15  # share of the families of prompts for each of validation and test

RATE = 8000  # samples per second
WINDOW = 4352  # samples that a prediction hears, 0.54 s
FRAME, HOP = 256, 128  # samples of a spectrum, and from one to the next
BANDS = 32
HEARD_AT_ONCE = 512  # windows
GRID = 80  # windows begin at multiples of so many samples

BABBLE = 4  # other windows that are heard beside one
SIGNAL_TO_NOISE = (0.0, 20.0)  # dB, drawn evenly


class Recording(NamedTuple):
    """A prompt: the number of its voice, its name with its folder in the voice's, and int16 samples [N]."""

    voice: int
    name: str
    samples: Tensor


class Speech(NamedTuple):
    """Recordings one after another, and the windows of them that are not mostly pause.

    Attributes:
        samples: int16 [N].
        starts: the first samples of the windows, those of one voice together, int64.
        windows: how many each voice has, int64 [voices].
    """

    samples: Tensor
    starts: Tensor
    windows: Tensor


class Examples(NamedTuple):
    """What a model hears and should answer: log-mel features [T, B, BANDS] and numbers of voices [B]."""

    features: Tensor
    voices: Tensor


class LanguageModel(nn.Module):
    """Scores for the languages.

    Args:
        mean, scale: what each feature is reduced and then divided by, [BANDS].
        rnn: the recurrent layer, called as nn.LSTM is, of [T, B, BANDS] and with its attributes.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor, rnn: Any) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.rnn = rnn
        self.decoder = nn.Linear(rnn.hidden_size, len(VOICES))

    def forward(self, features: Tensor) -> Tensor:
        """Take features [T, B, BANDS], return scores [B, voices] from the mean over time of the layer's outputs."""
        return self.decoder(self.rnn((features - self.mean) / self.scale)[0].mean(0))


@dataclasses.dataclass(frozen=True)
class Sounds(Task):
    """Attributes beside those of every task.

    train: speech. A prompt is in one split in all languages, with those whose names end in a like word.
    validation, test: batches of examples, always the same.
    mean, scale: of each feature of the training split, [BANDS].
    sha256: of all recordings, and of the split of each.
    peak_rate: for a long training: of 2e-3, 4e-3 and 7e-3, on validation, a dense net learns best with the first, and
        unlearns with the last; a net pruned to 90 % learns as well with the second.
    """

    name: ClassVar[str] = "sounds"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("error_percent", "windows misheard, %", 2),
        Metric("nats", "loss, nats per window", 3),
    )

    train: Speech
    validation: list[Examples]
    test: list[Examples]
    mean: Tensor
    scale: Tensor
    sha256: str
    hidden_size: int = 192
    batch_size: int = 32
    peak_rate: float = 2e-3
    warmup: float = 0.05
    steps: int = 1600

    @classmethod
    def load(cls, root: Path = ROOT) -> Sounds:
        return cls.of(read(root))

    @classmethod
    def of(cls, recordings: Iterable[Recording], *, held_out_batches: int = 8, **settings: Any) -> Sounds:
        """Split recordings, and fix what is heard of those held out: batches of HEARD_AT_ONCE windows."""
        splits: dict[str, list[Recording]] = {"train": [], "validation": [], "test": []}
        digest = hashlib.sha256()
        for recording in recordings:
            split = split_of_prompt(recording.name)
            digest.update(f"{split} {recording.voice} {recording.name} ".encode() + recording.samples.numpy().tobytes())
            splits[split].append(recording)
        train, *held_out = map(join, splits.values())
        generator = torch.Generator().manual_seed(0)
        validation, test = (
            [examples(speech, HEARD_AT_ONCE, generator) for _ in range(held_out_batches)] for speech in held_out
        )
        heard = examples(train, HEARD_AT_ONCE, torch.Generator().manual_seed(0)).features.flatten(0, 1)
        return cls(train, validation, test, heard.mean(0), heard.std(0), digest.hexdigest(), **settings)

    def settings(self) -> dict[str, Any]:
        return numbers_of(self) | {
            "sha256": self.sha256,
            "window": WINDOW,
            "frame": FRAME,
            "hop": HOP,
            "bands": BANDS,
            "babble": BABBLE,
            "signal_to_noise": list(SIGNAL_TO_NOISE),
            "windows_held_out": len(self.test) * HEARD_AT_ONCE,
        }

    def build_model(self, make_rnn: MakeRNN, seed: int) -> LanguageModel:
        torch.manual_seed(seed)
        return LanguageModel(self.mean, self.scale, make_rnn(BANDS, self.hidden_size))

    def losses(self, model: nn.Module, seed: int, teacher: Teacher | None = None) -> Iterator[Tensor]:
        """Hear windows drawn anew each time; a teacher hears the same."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            features, voices = examples(self.train, self.batch_size, generator)
            scores = model(features)
            loss = F.cross_entropy(scores, voices)
            if teacher is not None:
                loss = loss + teacher.loss(scores, teacher(features))
            yield loss

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, split: HeldOut) -> dict[str, float]:
        held_out = self.test if split == "test" else self.validation
        scores = torch.cat([model(features) for features, _ in held_out])
        voices = torch.cat([voices for _, voices in held_out])
        return {
            "error_percent": 100 * (scores.argmax(1) != voices).double().mean().item(),
            "nats": F.cross_entropy(scores, voices).item(),
        }


def read(root: Path) -> list[Recording]:
    """Return what is spoken in the WAV files below root/VOICES, in the order of their names."""
    recordings = []
    for voice, folder in enumerate(VOICES):
        for path in sorted((root / folder).rglob("*.wav")):
            name = path.relative_to(root / folder).with_suffix("").as_posix()
            if not NOT_SPEECH.match(name):
                with wave.open(str(path)) as file:
                    if (form := file.getparams()[:3]) != (1, 2, RATE):
                        raise ValueError(f"{path} must have 1 channel, 2 bytes a sample, {RATE} Hz, has {form}")
                    samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
                recordings.append(Recording(voice, name, torch.tensor(samples.astype(np.int16))))
    return recordings


def split_of_prompt(name: str) -> str:
    """Decide by how the last longer word of a prompt's name begins, "mes" in vm-message and vm-messagex1.

    Numbers and letters, many of which sound alike, have no such word and are one family.
    """
    words = re.findall("[a-z]{3,}", name.rpartition("/")[2].lower())
    family = words[-1][:3] if words else ""
    return split_of(family, HELD_OUT, HELD_OUT)


def join(recordings: Iterable[Recording]) -> Speech:
    """Put recordings one after another. A window lies in one of them, and has at least half of its mean power.

    Raises:
        MissingDataError: a voice has no window.
    """
    samples, starts, length = [], [[] for _ in VOICES], 0
    for recording in recordings:
        energy = F.pad(recording.samples.double().square().cumsum(0), (1, 0))
        begin = torch.arange(0, max(0, len(recording.samples) - WINDOW + 1), GRID)
        power = (energy[begin + WINDOW] - energy[begin]) / WINDOW
        loud = power >= max(energy[-1].item() / max(1, len(recording.samples)) / 2, 1)
        starts[recording.voice].append(length + begin[loud])
        samples.append(recording.samples)
        length += len(recording.samples)
    windows = torch.tensor([sum(map(len, part)) for part in starts])
    if missing := [voice for voice, count in zip(VOICES, windows, strict=True) if not count]:
        raise MissingDataError(f"sounds: too few recordings of {', '.join(missing)}; {INSTALL}")
    return Speech(torch.cat(samples), torch.cat([begin for part in starts for begin in part]), windows)


def examples(speech: Speech, count: int, generator: torch.Generator) -> Examples:
    """Draw windows, each voice as often, to be heard among BABBLE others and white noise, mixed in random shares."""
    voices = torch.randint(len(VOICES), (count, 1 + BABBLE), generator=generator)
    first = speech.windows.cumsum(0) - speech.windows
    chosen = (torch.rand(voices.shape, generator=generator, dtype=torch.float64) * speech.windows[voices]).long()
    begin = speech.starts[first[voices] + chosen]
    heard = speech.samples.unfold(0, WINDOW, 1).index_select(0, begin.flatten()).float()
    heard = unit_power(heard.view(*begin.shape, WINDOW))
    white = torch.randn((count, WINDOW), generator=generator)
    share, level = torch.rand((2, count, 1), generator=generator)
    noise = share * white + (1 - share) * unit_power(heard[:, 1:].sum(1))
    low, high = SIGNAL_TO_NOISE
    return Examples(log_mel(mix(heard[:, 0], noise, low + (high - low) * level)), voices[:, 0])


def mix(signal: Tensor, noise: Tensor, decibel: Tensor) -> Tensor:
    """Add noise of a power that is so many decibels below the signal's, and return windows of mean power 1: [B, N]."""
    return unit_power(unit_power(signal) + 10 ** (-decibel / 20) * unit_power(noise))


def unit_power(windows: Tensor) -> Tensor:
    return windows / windows.square().mean(-1, keepdim=True).sqrt()


def log_mel(windows: Tensor) -> Tensor:
    """Return the logarithm of the power in each band: [B, N] to [1 + (N - FRAME) // HOP, B, BANDS]."""
    spectrum = torch.stft(windows, FRAME, HOP, window=torch.hann_window(FRAME), center=False, return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()
    return (power.permute(2, 0, 1) @ mel_bands().t()).clamp_min(1e-6).log()


def mel_bands() -> Tensor:
    """Return the weights of the frequencies of a spectrum in each band, [BANDS, 1 + FRAME // 2].

    Triangles that overlap by half, of equal width on the mel scale m = 2595 log10(1 + f / 700 Hz).
    """
    top = 2595 * math.log10(1 + RATE / 2 / 700)
    corners = 700 * (10 ** (torch.linspace(0, top, BANDS + 2) / 2595) - 1)
    low, middle, high = (corners[k : k + BANDS, None] for k in range(3))
    frequencies = torch.linspace(0, RATE / 2, 1 + FRAME // 2)
    return torch.minimum((frequencies - low) / (middle - low), (high - frequencies) / (high - middle)).clamp_min(0)
