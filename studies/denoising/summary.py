"""Quality and speed of every model, from the lines of a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from studies.denoising.conversion import UNCONVERTED, WEIGHT_DTYPES
from studies.denoising.evaluation import Quality, mean_db
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
        quality: by group, SI-SDR in dB, of each seed the mean over mixtures.
        by_noise: the same by kind of noise, over all groups.
        speed: what timing found, None if it was not timed.
    """

    label: str
    row: Row | None
    form: str
    quality: dict[str, Spread]
    by_noise: dict[str, Spread]
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
    own: Iterable[dict[str, Any]],
    times: Mapping[Key, dict[str, Any]],
    timed: str | None,
) -> Model:
    qualities: list[Quality] = [run["quality"][form] for run in own]
    speed = times.get(Key(SPEED_TASK, timed, 0, 0)) if timed else None
    return Model(
        label,
        row,
        form,
        {group: _spread(quality[group] for quality in qualities) for group in GROUPS},
        {kind: _spread(_of_kind(quality, place) for quality in qualities) for place, kind in enumerate(KINDS)},
        speed,
    )


def _of_kind(quality: Quality, place: int) -> list[float]:
    """Return what has the kind of noise at this place: kinds take turns in every group."""
    return [value for values in quality.values() for value in values[place :: len(KINDS)]]


def _spread(values: Iterable[list[float]]) -> Spread:
    spread = Spread.of(mean_db(one) for one in values)
    assert spread is not None
    return spread
