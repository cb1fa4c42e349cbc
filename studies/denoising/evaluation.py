"""How much closer to clean speech a denoiser brings what was held out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from studies.denoising.model import Denoiser
from studies.denoising.noise import Pair
from studies.denoising.signals import features, si_sdr_db, spectrum, waveform

Gains = Callable[[Tensor], Tensor]  # features [1, T, BINS] -> gains of the same shape
Quality = dict[str, list[float]]  # by group, SI-SDR in dB of each mixture

DIGITS = 3


@torch.inference_mode()
def evaluate(gains: Gains, pairs: Mapping[str, Sequence[Pair]]) -> Quality:
    """Return the SI-SDR of every mixture after its spectrum is multiplied by the gains."""
    quality: Quality = {}
    for group, members in pairs.items():
        for pair in members:
            noisy = spectrum(pair.noisy)[None]
            estimate = waveform(gains(features(noisy)) * noisy, len(pair.noisy))[0]
            quality.setdefault(group, []).append(round(si_sdr_db(estimate, pair.clean).item(), DIGITS))
    return quality


def gains_of(model: Denoiser) -> Gains:
    """Return a call that runs the model over whole sequences from a state of zeros."""
    return lambda features: model(features)[0]


def unchanged(features: Tensor) -> Tensor:
    """The gains that leave noise in."""
    return torch.ones_like(features)


def mean_db(values: Sequence[float]) -> float:
    """Return the mean over mixtures."""
    return statistics.fmean(values)
