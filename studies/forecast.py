"""How far `forecast` is from what then happens, on the demo's task.

    python -m studies.forecast            (about 3 minutes on 2 cores; --text as for the demo)

A dense model is trained first: it is the reference, and its weights give q of the threshold ramps. Then each pruner is
forecast and trained, from the same weights on the same text.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from triton_sparse_rnn import PolynomialDecay, Pruner, ThresholdRamp, forecast
from triton_sparse_rnn.demo.settings import QUICK, Settings
from triton_sparse_rnn.demo.text import Text, load_text
from triton_sparse_rnn.demo.training import Training
from triton_sparse_rnn.pruning.schedules import Schedule
from triton_sparse_rnn.tables import align

HEADINGS = ("schedule", "block", "updates", "forecast", "became", "error, points")


@dataclasses.dataclass(frozen=True)
class Case:
    """A schedule that aims at a sparsity, for blocks of one size."""

    schedule: str
    block_size: tuple[int, int]
    sparsity: float


CASES = [
    *(Case("PolynomialDecay", block, 0.9) for block in ((1, 1), (16, 1))),
    *(Case("ThresholdRamp", (1, 1), sparsity) for sparsity in (0.5, 0.7, 0.9)),
    *(Case("ThresholdRamp", block, 0.9) for block in ((16, 1), (16, 4), (16, 16))),
]


def run(case: Case, settings: Settings, text: Text, reference: torch.nn.Module) -> tuple[str, ...]:
    """Forecast and train one case; returns its row of the table."""
    training = Training("dense", settings, text)  # the plain model: the pruner is ours
    pruner = Pruner(training.model, _schedule(case, settings, reference), pattern=case.block_size)
    predicted = forecast(training.model, pruner, reference).sparsity
    schedule = pruner.weights[0].schedules[0]
    assert schedule is not None
    with pruner.attach(training.optimizer):
        while not training.finished:
            training.step()
    updates = sum(schedule.updates_at(step) for step in range(settings.steps + 1))
    error = 100 * (predicted - pruner.sparsity)
    block = "x".join(map(str, case.block_size))
    aim = f"{case.schedule} {case.sparsity:.0%}"
    return aim, block, str(updates), f"{predicted:.1%}", f"{pruner.sparsity:.1%}", f"{error:+.1f}"


def _schedule(case: Case, settings: Settings, reference: torch.nn.Module) -> Schedule:
    begin, end = (round(share * settings.steps) for share in (settings.prune_begin, settings.prune_end))
    steps: dict[str, Any] = {"begin_step": begin, "end_step": end, "frequency": settings.prune_every}
    if case.schedule == "PolynomialDecay":
        return PolynomialDecay(final_sparsity=case.sparsity, **steps)
    return ThresholdRamp.from_weights(
        reference, case.sparsity, pattern=case.block_size, ramp_step=begin + (end - begin) // 3, **steps
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m studies.forecast", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, help="a file or a folder of text; the standard library's sources without")
    options = parser.parse_args(arguments)
    settings = QUICK
    torch.set_num_threads(settings.threads)
    text = load_text(options.text, min_bytes=settings.min_bytes, seed=settings.seed)
    dense = Training("dense", settings, text)
    while not dense.finished:
        dense.step()
    rows = [run(case, settings, text, dense.model) for case in track(CASES, "training")]
    print(f"GRU {settings.hidden_size}, {settings.steps} steps on {text.name}; weight_ih and weight_hh together")
    print("\n".join(align([HEADINGS, *rows], right=range(2, 6))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
