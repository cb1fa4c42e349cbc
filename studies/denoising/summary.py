"""Quality and speed of every model, from the lines of a file."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from studies.denoising.conversion import UNCONVERTED, WEIGHT_DTYPES
from studies.denoising.evaluation import SI_SDR, STOI, ByGroup, Quality, mean_stoi_percent
from studies.denoising.noise import KINDS
from studies.denoising.rows import BY_NAME, DENSE, NOISY, ORIGINAL, ROWS, TASK, Row
from studies.denoising.speech import GROUPS
from studies.denoising.timing import ONNXRUNTIME, SPEED_TASK, TORCH, contender_name
from studies.runs.records import Key, Lines
from studies.runs.spread import Spread


class Model(NamedTuple):
    """A model as it is used.

    Attributes:
        row: None for what was not fine-tuned.
        si_sdr: by group, in dB, of each seed the mean over mixtures.
        by_noise: the same by kind of noise, over all groups.
        stoi: in percent, of each seed the mean over groups; None where it was not measured.
        speed: what timing found, None if it was not timed.
    """

    label: str
    row: Row | None
    form: str
    si_sdr: dict[str, Spread]
    by_noise: dict[str, Spread]
    stoi: Spread | None
    speed: dict[str, Any] | None


def models_of(lines: Lines) -> list[Model]:
    """Return what files hold: noisy speech, the original, then the rows in their order.

    Raises:
        ValueError: there are runs of different numbers of steps.
    """
    runs, trained = lines.runs, [key for key in lines.runs if key.row in BY_NAME]
    if len({key.steps for key in trained}) > 1:
        raise ValueError("the files hold runs of different numbers of steps; give those of one")
    found = []
    for row, speed in ((NOISY, None), (ORIGINAL, ONNXRUNTIME), (ORIGINAL, TORCH)):
        if (run := runs.get(Key(TASK, row.name, 0, 0))) is not None:
            found.append(_model(speed or "noisy speech", None, UNCONVERTED, [run], lines.times, speed))
    for row in ROWS:
        own = [runs[key] for key in trained if key.row == row.name]
        label = "fine-tuned, not pruned" if row == DENSE else f"pruned {row.name}"
        for form in (UNCONVERTED, *WEIGHT_DTYPES) if own else ():
            timed = TORCH if form == UNCONVERTED and row == DENSE else contender_name(row.name, form)
            found.append(_model(label, row, form, own, lines.times, timed))
    return found


def _model(
    label: str,
    row: Row | None,
    form: str,
    own: Sequence[dict[str, Any]],
    times: Mapping[Key, dict[str, Any]],
    timed: str | None,
) -> Model:
    qualities: list[Quality] = [run["quality"][form] for run in own]
    speed = times.get(Key(SPEED_TASK, timed, 0, 0)) if timed else None
    decibels = [quality[SI_SDR] for quality in qualities]
    return Model(
        label,
        row,
        form,
        {group: _spread(one[group] for one in decibels) for group in GROUPS},
        {kind: _spread(_of_kind(one, place) for one in decibels) for place, kind in enumerate(KINDS)},
        Spread.of(mean_stoi_percent(quality) for quality in qualities if STOI in quality),
        speed,
    )


def _of_kind(by_group: ByGroup, place: int) -> list[float]:
    """Return what has the kind of noise at this place: kinds take turns in every group."""
    return [value for values in by_group.values() for value in values[place :: len(KINDS)]]


def _spread(values: Iterable[list[float]]) -> Spread:
    spread = Spread.of(statistics.fmean(one) for one in values)
    assert spread is not None
    return spread
