"""The runs as Markdown."""

from __future__ import annotations

from studies.denoising.conversion import UNCONVERTED
from studies.denoising.noise import KINDS
from studies.denoising.rows import DENSE
from studies.denoising.speech import GROUPS
from studies.denoising.summary import Model, models_of
from studies.denoising.timing import ONNXRUNTIME, TORCH
from studies.runs.records import Lines
from studies.runs.sections import origin
from studies.runs.spread import markdown

NOTE = (
    "SI-SDR in dB, by group, and STOI, the mean of the groups: means over held-out mixtures. Microseconds a frame"
    " (10 ms of sound) from features to gains, batch 1, one thread, of the fastest round; in brackets how many times as"
    " fast as the original in onnxruntime, used the same way."
)


def tables(lines: Lines) -> str:
    """Return quality and speed in one table, then quality by kind of noise, then where it was measured."""
    found = models_of(lines)
    used = [model for model in found if model.row in (None, DENSE) or model.form != UNCONVERTED]
    baseline = next((model for model in found if model.label == ONNXRUNTIME), None)
    speed = [_cells(model, baseline) for model in used]
    headings = ["model", "zeros of the GRU, %", "weights, MB", *GROUPS, "STOI, %", "µs, streamed", "µs, whole sequence"]
    parts = [markdown(headings, speed), NOTE]
    noise = [
        [model.label, *(f"{model.by_noise[kind].mean:.2f}" for kind in KINDS)]
        for model in found
        if model.form == UNCONVERTED and model.label != TORCH
    ]
    return "\n\n".join([*parts, markdown(["SI-SDR in dB, by noise", *KINDS], noise), _origin(lines)])


def _cells(model: Model, baseline: Model | None) -> list[str]:
    zeros = "" if model.row is None else f"{100 * model.row.sparsity:g}"
    nbytes = "" if model.speed is None else f"{model.speed['nbytes'] / 1e6:.2f}"
    quality = [model.si_sdr[group].text(2) for group in GROUPS]
    return [
        _name(model),
        zeros,
        nbytes,
        *quality,
        "" if model.stoi is None else model.stoi.text(1),
        *(_time(model, baseline, way) for way in ("streamed_us", "whole_us")),
    ]


def _name(model: Model) -> str:
    return model.label if model.row is None else f"{model.label}, {model.form}"


def _time(model: Model, baseline: Model | None, way: str) -> str:
    if model.speed is None:
        return ""
    us = model.speed[way]["least"]
    if baseline is None or baseline.speed is None:
        return f"{us:.0f}"
    return f"{us:.0f} ({baseline.speed[way]['least'] / us:.1f})"


def _origin(lines: Lines) -> str:
    trained = [run for run in lines.runs.values() if run["steps"]]
    return f"Runs of {trained[0]['steps']} steps: {len(trained)}, {origin(trained)}" if trained else ""
