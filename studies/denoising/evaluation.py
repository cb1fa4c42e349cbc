"""How much closer to clean speech a denoiser brings what was held out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from studies.denoising.model import Denoiser, import_or_say
from studies.denoising.noise import Pair
from studies.denoising.signals import RATE_HZ, features, si_sdr_db, spectrum, waveform

Gains = Callable[[Tensor], Tensor]  # features [1, T, BINS] -> gains of the same shape
ByGroup = dict[str, list[float]]  # of each mixture
Quality = dict[str, ByGroup]  # by measure

SI_SDR, STOI = "si_sdr_db", "stoi"  # in dB; from 0 to 1, a share of what can be understood
DIGITS = {SI_SDR: 3, STOI: 5}


@torch.inference_mode()
def evaluate(gains: Gains, pairs: Mapping[str, Sequence[Pair]]) -> Quality:
    """Return SI-SDR and STOI of every mixture after its spectrum is multiplied by the gains.

    Raises:
        MissingDataError: pystoi is missing.
    """
    intelligibility = stoi()
    quality: Quality = {SI_SDR: {}, STOI: {}}
    for group, members in pairs.items():
        for pair in members:
            noisy = spectrum(pair.noisy)[None]
            estimate = waveform(gains(features(noisy)) * noisy, len(pair.noisy))[0]
            found = {SI_SDR: si_sdr_db(estimate, pair.clean).item(), STOI: intelligibility(estimate, pair.clean)}
            for measure, value in found.items():
                quality[measure].setdefault(group, []).append(round(value, DIGITS[measure]))
    return quality


def stoi() -> Callable[[Tensor, Tensor], float]:
    """Return the short-time objective intelligibility (Taal et al. 2011) of an estimate [N] and a clean signal [N].

    Raises:
        MissingDataError: pystoi is missing.
    """
    measure = import_or_say("pystoi").stoi
    return lambda estimate, clean: float(
        measure(clean.double().numpy(), estimate.double().numpy(), RATE_HZ, extended=False)
    )


def gains_of(model: Denoiser) -> Gains:
    """Return a call that runs the model over whole sequences from a state of zeros."""
    return lambda features: model(features)[0]


def unchanged(features: Tensor) -> Tensor:
    """The gains that leave noise in."""
    return torch.ones_like(features)


def mean_stoi_percent(quality: Quality) -> float:
    """Return the mean of the groups' means."""
    return 100 * statistics.fmean(map(statistics.fmean, quality[STOI].values()))
