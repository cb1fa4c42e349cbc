"""Recorded speech at 16 kHz: where it is, how it is split, and how it is kept once it is decoded.

Three voices of Asterisk's telephone prompts (four languages) are split by recording, a fourth is held out whole, and so
are the test recordings of pocketsphinx: other voices, other rooms, and no telephone codec.
"""

from __future__ import annotations

import dataclasses
import hashlib
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from studies.denoising.signals import RATE_HZ
from studies.tasks.task import MissingDataError, share_of
from triton_sparse_rnn.atomic_files import write_atomically

ASTERISK = Path("/usr/share/asterisk/sounds")
POCKETSPHINX = Path("/usr/share/pocketsphinx/test/data")
VOICES = {
    "en_US_f_Allison": "Allison",
    "es_MX_f_Allison": "Allison",
    "it_IT_m_Carlo": "Carlo",
    "ru_RU_f_IvrvoiceRU": "Ivrvoice",
}
UNKNOWN_VOICE = "fr_CA_f_June"
NO_SPEECH = ("silence/", "beep", "tt-monkeys.", "tt-weasels.", "ascending-2tone", "descending-2tone")
BITS_PER_SECOND = 64_000  # of G.722

GROUPS = ("known voices", "unknown voice", "other corpus")  # of what is held out
HELD_OUT = {"known voices": 0.06, "unknown voice": 0.25}  # shares of the prompts
SHORTEST, LONGEST = 2 * RATE_HZ, 8 * RATE_HZ  # recordings that are evaluated; longer ones are cut
FULL_SCALE = 2**15


@dataclasses.dataclass(frozen=True)
class Speech:
    """Samples in [-1, 1).

    Attributes:
        train: by voice, all recordings one after another, [N].
        held_out: by group, the recordings.
    """

    train: dict[str, Tensor]
    held_out: dict[str, list[Tensor]]

    @classmethod
    def load(cls, path: Path) -> Speech:
        """Read what an earlier call decoded into `path`, or decode and write it (about a minute).

        Raises:
            MissingDataError: a package is missing.
        """
        if not path.exists():
            decoded = _decode()
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, [save(decoded)])
        train: dict[str, Tensor] = {}
        held_out: dict[str, list[Tensor]] = {group: [] for group in GROUPS}
        for name, samples in sorted(load_file(path).items()):
            part, where, *_ = name.split(":")
            signal = samples.float() / FULL_SCALE
            if part == "train":
                train[where] = signal
            else:
                held_out[where].append(signal)
        return cls(train, held_out)

    def sha256(self) -> str:
        """Of all samples, in their order."""
        digest = hashlib.sha256()
        for samples in [*self.train.values(), *(one for group in GROUPS for one in self.held_out[group])]:
            digest.update(samples.numpy().tobytes())
        return digest.hexdigest()


def _decode() -> dict[str, Tensor]:
    """Return int16 samples by "train:VOICE" and "held out:GROUP:RECORDING"."""
    train: dict[str, list[Tensor]] = {}
    held_out: dict[str, Tensor] = {}
    for folder, voice in VOICES.items():
        for name, samples in _prompts(folder):
            if share_of(name) < HELD_OUT["known voices"]:  # in every language
                held_out[f"held out:known voices:{folder}/{name}"] = samples
            else:
                train.setdefault(voice, []).append(samples)
    for name, samples in _prompts(UNKNOWN_VOICE):
        if share_of(name) < HELD_OUT["unknown voice"]:
            held_out[f"held out:unknown voice:{UNKNOWN_VOICE}/{name}"] = samples
    for name, samples in _pocketsphinx():
        held_out[f"held out:other corpus:{name}"] = samples
    long_enough = {name: samples[:LONGEST].clone() for name, samples in held_out.items() if len(samples) >= SHORTEST}
    return long_enough | {f"train:{voice}": torch.cat(parts) for voice, parts in train.items()}


def _prompts(folder: str) -> Iterator[tuple[str, Tensor]]:
    """Yield names and samples of one voice's prompts, without those that hold no speech."""
    try:
        from G722 import G722  # pyright: ignore[reportMissingImports] - it is in the extra "bench"
    except ImportError:
        raise MissingDataError("a decoder is missing; pip install G722") from None
    paths = sorted((ASTERISK / folder).glob("**/*.g722"))
    if not paths:
        language = folder[:2]
        raise MissingDataError(f"recordings are missing; apt-get install asterisk-core-sounds-{language}-g722")
    for path in paths:
        name = str(path.relative_to(ASTERISK / folder))
        if not name.startswith(NO_SPEECH):
            decoder = G722(RATE_HZ, BITS_PER_SECOND)
            yield name, torch.from_numpy(np.array(decoder.decode(path.read_bytes()), np.int16))


def _pocketsphinx() -> Iterator[tuple[str, Tensor]]:
    """Yield names and samples of wav and headerless files, all of 16 bits at 16 kHz."""
    paths = sorted([*POCKETSPHINX.glob("**/*.wav"), *POCKETSPHINX.glob("**/*.raw")])
    if not paths:
        raise MissingDataError("recordings are missing; apt-get install pocketsphinx-testdata")
    for path in paths:
        content = path.read_bytes()
        if path.suffix == ".wav":
            with wave.open(str(path)) as file:
                form = file.getframerate(), file.getsampwidth(), file.getnchannels()
                if form != (RATE_HZ, 2, 1):
                    raise MissingDataError(f"{path} must be of 16 bits, one channel, 16 kHz, got {form}")
                content = file.readframes(file.getnframes())
        yield path.name, torch.from_numpy(np.frombuffer(content, "<i2").astype(np.int16))
