"""Fine-tuning: the trained model goes on learning, on speech with noise, and is pruned or not while it does."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from studies.denoising.model import Denoiser
from studies.denoising.noise import Pair, training_batch
from studies.denoising.rows import Row
from studies.denoising.signals import RATE_HZ, features, spectrum
from studies.denoising.speech import Speech
from studies.runs.study import OnStep
from studies.tasks.task import straight_rate
from triton_sparse_rnn import Pruner, sparsify
from triton_sparse_rnn.doctor import describe_processor
from triton_sparse_rnn.pruning import Distillation

COMPRESSION = COMPLEX_SHARE = 0.3
SMALLEST_MAGNITUDE = 1e-6  # below it the root is cut off, whose slope at 0 is infinite


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it; without them bfloat16 is slower than float32."""
    return "avx512_bf16" in describe_processor()["vector_instructions"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all rows have in common.

    Attributes:
        seconds: of each of the `batch_size` mixtures of a step.
        largest_gradient: its norm is cut to this.
        bfloat16: for the products of the forward and backward pass; weights and their updates are float32.
            By default where the processor is faster with it.
        layers_weight: in the loss of what is taught, of the distance of the GRU layers' outputs; see `Distillation`.
        gains_weight: there, of the mean squared distance of the gains, relative to the mean square of the teacher's.
    """

    steps: int = 800
    batch_size: int = 16
    seconds: float = 1.5
    warmup: float = 0.05
    largest_gradient: float = 1.0
    bfloat16: bool = dataclasses.field(default_factory=multiplies_bfloat16)
    layers_weight: float = 1.0
    gains_weight: float = 1.0


def fine_tune(
    model: Denoiser,
    row: Row,
    speech: Speech,
    seed: int,
    settings: Settings,
    on_step: OnStep = lambda loss: None,
    teacher: Denoiser | None = None,
) -> list[float]:
    """Train `model` in place; it ends in eval mode.

    Args:
        row: how; what it begins with is in `model` already.
        seed: of speech and noise.
        on_step: called with the loss after every step.
        teacher: the trained dense model, in eval mode, for a row that is taught.
    Returns:
        The loss of every step.
    """
    assert (teacher is not None) == row.taught
    sparsify(model).train()
    optimizer = torch.optim.Adam(model.parameters())
    if (schedule := row.schedule(settings.steps)) is not None:
        Pruner(model, schedule, pattern=row.pattern, include=row.include).attach(optimizer)
    losses: list[float] = []
    with _teaching(model, teacher, settings) as distillation:
        for step, pair in zip(range(settings.steps), _batches(speech, seed, settings), strict=False):
            rate = row.peak_rate * straight_rate(step, settings.steps, settings.warmup, row.held)
            optimizer.param_groups[0]["lr"] = rate
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.bfloat16):
                gains = model(features(spectrum(pair.noisy)))[0].float()
            loss = spectral_loss(gains, pair)
            if distillation is not None:
                taught = distillation.taught[0].float()
                loss = loss + distillation.loss() + settings.gains_weight * relative_distance(gains, taught)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.largest_gradient)
            optimizer.step()
            losses.append(loss.item())
            on_step(losses[-1])
    model.eval()
    return losses


def relative_distance(gains: Tensor, taught: Tensor) -> Tensor:
    """Return mean |gains - taught|^2 / mean |taught|^2: 0 is as the teacher, 1 as far as zeros are from it."""
    return (gains - taught).square().mean() / taught.square().mean()


def spectral_loss(gains: Tensor, pair: Pair) -> Tensor:
    """Return how far compressed spectra are from those of the clean speech (Braun & Tashev 2020).

        (1 - b) mean(| |S|^c - |G X|^c |^2) + b mean(| |S|^c exp(i arg S) - |G X|^c exp(i arg X) |^2),  b = c = 0.3

    Both signals are first scaled so that the clean one has a mean power of 1.

    Args:
        gains: G [B, T, BINS].
        pair: samples [B, N], whose spectra are X and S.
    """
    scale = pair.clean.square().mean(-1, keepdim=True).rsqrt()
    noisy, clean = spectrum(pair.noisy * scale), spectrum(pair.clean * scale)
    wanted = clean.abs().clamp_min(SMALLEST_MAGNITUDE) ** COMPRESSION
    found = (gains * noisy.abs()).clamp_min(SMALLEST_MAGNITUDE) ** COMPRESSION
    difference = (wanted - found).square()
    crossed = 2 * wanted * found * (1 - torch.cos(noisy.angle() - clean.angle()))  # what phases add to the difference
    return (difference + COMPLEX_SHARE * crossed).mean()


def _teaching(
    model: Denoiser, teacher: Denoiser | None, settings: Settings
) -> contextlib.AbstractContextManager[Distillation | None]:
    if teacher is None:
        return contextlib.nullcontext()
    return Distillation(model, teacher, weight=settings.layers_weight)


def _batches(speech: Speech, seed: int, settings: Settings) -> Iterator[Pair]:
    chance = np.random.default_rng(seed)
    while True:
        yield training_batch(speech, chance, settings.batch_size, round(settings.seconds * RATE_HZ))
