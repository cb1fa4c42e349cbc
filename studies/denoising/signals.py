"""From samples to spectra and back, and how close an estimate of a signal is to it."""

from __future__ import annotations

import torch
from torch import Tensor

RATE_HZ = 16_000
WINDOW = 320  # samples: 20 ms
HOP = 160
BINS = WINDOW // 2 + 1
SMALLEST_POWER = 1e-12  # below it the logarithm is cut off, as in the original


def spectrum(samples: Tensor) -> Tensor:
    """Return the complex spectra [..., T, BINS] of frames of WINDOW samples, HOP apart.

    Args:
        samples: [..., N]. Zeros are added before the first sample, so that frame t ends with sample (t + 1) * HOP, and
            behind the last one, so that every sample lies in two frames.
    """
    N = samples.shape[-1]
    after = HOP + -N % HOP
    frames = torch.nn.functional.pad(samples, (WINDOW - HOP, after)).unfold(-1, WINDOW, HOP)
    return torch.fft.rfft(frames * _window(samples))


def waveform(spectra: Tensor, N: int) -> Tensor:
    """Return the N samples [..., N] of which `spectrum` made [..., T, BINS]: frames are windowed again and added."""
    frames = torch.fft.irfft(spectra, n=WINDOW)
    frames = frames * _window(frames)
    first, second = frames[..., :HOP], frames[..., HOP:]
    # Frame t begins HOP samples before sample t * HOP, so its second half meets the first half of the next frame.
    return (second[..., :-1, :] + first[..., 1:, :]).flatten(-2)[..., :N]


def features(spectra: Tensor) -> Tensor:
    """Return what the model reads: the base-10 logarithm of the power, of the shape of `spectra`."""
    return spectra.abs().square().clamp_min(SMALLEST_POWER).log10()


def si_sdr_db(estimate: Tensor, target: Tensor) -> Tensor:
    """Return the scale-invariant signal-to-distortion ratio of each signal in dB (Le Roux et al. 2019, "SDR").

        a = <estimate, target> / |target|^2,  SI-SDR = 10 log10(|a target|^2 / |a target - estimate|^2)

    Args:
        estimate, target: [..., N], of one shape.
    """
    estimate, target = estimate.double(), target.double()
    scale = (estimate * target).sum(-1, keepdim=True) / target.square().sum(-1, keepdim=True)
    projection = scale * target
    return 10 * torch.log10(projection.square().sum(-1) / (projection - estimate).square().sum(-1))


def _window(like: Tensor) -> Tensor:
    """The root of a Hann window, whose squares add up to 1 where frames overlap."""
    return torch.hann_window(WINDOW, dtype=like.dtype, device=like.device).sqrt()
