"""Noise that is made up, and speech with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from studies.denoising.signals import RATE_HZ
from studies.denoising.speech import GROUPS, Speech

TRAINING_SNR_DB = (-5.0, 20.0)
TRAINING_LEVEL_DB = (-35.0, -15.0)  # of the mixture, to full scale
HELD_OUT_SNR_DB = (0.0, 5.0, 10.0, 15.0)
HELD_OUT_LEVEL_DB = -25.0
HELD_OUT_SEED = 1_000_000  # training never uses it
HELD_OUT_MIXTURES = {"known voices": 1, "unknown voice": 1, "other corpus": 4}  # of each recording
TALKERS = 6  # of babble
QUIET = 1e-4  # power below which a stretch of speech is passed over

Noise = Callable[[np.random.Generator, int, Sequence[Tensor]], Tensor]


class Pair(NamedTuple):
    """Speech with noise, and the speech in it, [..., N]."""

    noisy: Tensor
    clean: Tensor


def white(chance: np.random.Generator, N: int, talk: Sequence[Tensor]) -> Tensor:
    """Every frequency alike; in half of the cases louder and quieter within seconds."""
    return _swelling(chance, torch.from_numpy(chance.standard_normal(N).astype(np.float32)))


def coloured(chance: np.random.Generator, N: int, talk: Sequence[Tensor]) -> Tensor:
    """Power falls with frequency f as f^-a, a from 0.5 to 2 (1: pink), up to 40 Hz flat."""
    spectrum = torch.fft.rfft(torch.from_numpy(chance.standard_normal(N).astype(np.float32)))
    frequency_hz = torch.fft.rfftfreq(N, 1 / RATE_HZ).clamp_min(40)
    return _swelling(chance, torch.fft.irfft(spectrum * frequency_hz ** (-chance.uniform(0.5, 2) / 2), N))


def hum(chance: np.random.Generator, N: int, talk: Sequence[Tensor]) -> Tensor:
    """Mains of 50 or 60 Hz with 20 harmonics, and a little white noise."""
    base_hz = chance.choice([50, 60]) * chance.uniform(0.995, 1.005)
    time = torch.arange(N) / RATE_HZ
    harmonics = torch.arange(1, 21)
    loudness = torch.from_numpy(chance.exponential(size=20).astype(np.float32)) / harmonics.sqrt()
    phases = torch.from_numpy(chance.uniform(0, 2 * np.pi, 20).astype(np.float32))
    tones = loudness[:, None] * torch.sin(2 * np.pi * base_hz * harmonics[:, None] * time + phases[:, None])
    return tones.sum(0) + 0.1 * torch.from_numpy(chance.standard_normal(N).astype(np.float32))


def babble(chance: np.random.Generator, N: int, talk: Sequence[Tensor]) -> Tensor:
    """Several others talk at once."""
    voices = [_stretch(chance, talk, N) for _ in range(TALKERS)]
    return torch.stack([voice / voice.square().mean().sqrt().clamp_min(1e-6) for voice in voices]).sum(0)


KINDS: dict[str, Noise] = {"white": white, "coloured": coloured, "hum": hum, "babble": babble}


def mix(clean: Tensor, noise: Tensor, snr_db: float, level_db: float) -> Pair:
    """Add noise so that the ratio of mean powers is `snr_db`, and scale both so that the mixture has `level_db`."""
    gain = (clean.square().mean() / noise.square().mean().clamp_min(1e-12)).sqrt() * 10 ** (-snr_db / 20)
    noisy = clean + gain * noise
    scale = 10 ** (level_db / 20) / noisy.square().mean().sqrt()
    return Pair(noisy * scale, clean * scale)


def training_batch(speech: Speech, chance: np.random.Generator, B: int, N: int) -> Pair:
    """Return [B, N] random stretches of the voices that are trained on, with random noise."""
    voices = [*speech.train.values()]
    pairs = []
    for _ in range(B):
        noise = list(KINDS.values())[int(chance.integers(len(KINDS)))](chance, N, voices)
        snr_db, level_db = chance.uniform(*TRAINING_SNR_DB), chance.uniform(*TRAINING_LEVEL_DB)
        pairs.append(mix(_stretch(chance, voices, N), noise, snr_db, level_db))
    return Pair(*(torch.stack(signals) for signals in zip(*pairs, strict=True)))


def held_out_pairs(speech: Speech) -> dict[str, list[Pair]]:
    """Return every held-out recording, by group, with noise; kinds and signal-to-noise ratios take turns."""
    pairs: dict[str, list[Pair]] = {}
    for group in GROUPS:
        recordings = speech.held_out[group]
        for i in range(len(recordings) * HELD_OUT_MIXTURES[group]):
            chance = np.random.default_rng([HELD_OUT_SEED, GROUPS.index(group), i])
            own = i % len(recordings)
            clean, others = recordings[own], [*recordings[:own], *recordings[own + 1 :]]
            noise = list(KINDS.values())[i % len(KINDS)](chance, len(clean), others)
            snr_db = HELD_OUT_SNR_DB[i // len(KINDS) % len(HELD_OUT_SNR_DB)]
            pairs.setdefault(group, []).append(mix(clean, noise, snr_db, HELD_OUT_LEVEL_DB))
    return pairs


def _stretch(chance: np.random.Generator, signals: Sequence[Tensor], N: int) -> Tensor:
    """Return N samples from a random place that is not quiet; a signal that is too short is repeated."""
    while True:
        signal = signals[int(chance.integers(len(signals)))]
        if len(signal) < N:
            signal = signal.repeat(-(-N // len(signal)))
        start = int(chance.integers(len(signal) - N + 1))
        stretch = signal[start : start + N]
        if stretch.square().mean() > QUIET:
            return stretch


def _swelling(chance: np.random.Generator, noise: Tensor) -> Tensor:
    if chance.random() < 0.5:
        return noise
    points = torch.from_numpy(chance.uniform(-10, 10, max(2, len(noise) // RATE_HZ * 2)).astype(np.float32))
    gain_db = torch.nn.functional.interpolate(points[None, None], len(noise), mode="linear", align_corners=True)[0, 0]
    return noise * 10 ** (gain_db / 20)
