"""A rule that says before pruning what it will cost, from one cheap run: that of a small dense model.

The error of dense models falls as a power of their parameters, n^-b, and two runs tell b: the dense model with N, and
one so small that it has no more than pruning will leave. A parameter that pruning leaves is worth several of a dense
model, and how many, `worth`, is taken to depend on the pattern alone:

    error of the pruned model = error of the dense model * (N / (worth n))^b, and no less than that of the dense model

with n parameters left. `worth` is found on one task at one sparsity; all else is told by the rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from studies.accuracy.rows import DENSE, IN_BLOCKS, IN_SINGLE, OTHERS, PICKS, PRUNED, SELF_TAUGHT, SMALL, Row
from studies.accuracy.summary import AccuracySection, ModelSummary, model_of
from studies.runs.spread import markdown

FITTED = {
    "picks": PRUNED,
    "16x1 blocks": IN_BLOCKS,
    "single weights": IN_SINGLE,
    "picks, taught by itself": SELF_TAUGHT,
}


class Size(NamedTuple):
    """Parameters of a model that are not zero, and its error on the test split."""

    parameters: float
    error: float


def power(dense: Size, small: Size) -> float:
    """Return b.

    >>> f"{power(Size(1000, 2.0), Size(100, 4.0)):.4f}"
    '0.3010'
    """
    return math.log(small.error / dense.error) / math.log(dense.parameters / small.parameters)


def worth(dense: Size, small: Size, pruned: Size) -> float:
    """Return how many parameters of a dense model one of the pruned model is worth.

    >>> f"{worth(Size(1000, 2.0), Size(100, 4.0), Size(100, 4.0)):.4f}"
    '1.0000'
    """
    cost = math.log(pruned.error / dense.error) / power(dense, small)
    return dense.parameters / pruned.parameters * math.exp(-cost)


def told(dense: Size, small: Size, parameters: float, worth: float) -> float:
    """Return the error that the rule tells of a pruned model.

    >>> f"{told(Size(1000, 2.0), Size(100, 4.0), 100, 2.0):.4f}"
    '3.2467'
    """
    return dense.error * max(1.0, dense.parameters / (worth * parameters)) ** power(dense, small)


def rule_of(found: Sequence[AccuracySection]) -> str:
    """Return what the rule tells of every pruned model that it was not fitted on, in Markdown; empty without a fit."""
    sections = [section for section in found if _dense_and_small(section)]
    fitted: dict[str, tuple[str, float]] = {}
    for kind, row in FITTED.items():
        for section in sections:
            if kind not in fitted and (pruned := _size(section, row)) is not None:
                dense, small = _dense_and_small(section) or (pruned, pruned)
                fitted[kind] = section.title, worth(dense, small, pruned)
    cells = [cell for section in sections for cell in _told(section, fitted)]
    if not cells:
        return ""
    worths = ", ".join(f"{value:.2f} ({kind}, by {title})" for kind, (title, value) in fitted.items())
    table = markdown(["task", "model", "cost told, %", "found, %", "error, points"], cells)
    return f"A parameter that is left is worth so many of a dense model: {worths}.\n\n{table}"


def _told(section: AccuracySection, fitted: Mapping[str, tuple[str, float]]) -> list[list[str]]:
    sizes = _dense_and_small(section)
    assert sizes is not None
    dense, small = sizes
    cells = []
    for model in section.models:
        kind = _kind(model)
        if kind not in fitted or (fitted[kind][0] == section.title and model.row is FITTED[kind]):
            continue
        size = _size_of(section, model)
        cost, became = (
            100 * (error / dense.error - 1)
            for error in (told(dense, small, size.parameters, fitted[kind][1]), size.error)
        )
        cells.append([section.title, model.name, f"{cost:+.1f}", f"{became:+.1f}", f"{cost - became:+.1f}"])
    return cells


def _kind(model: ModelSummary) -> str:
    """Return what is fitted of the model's kind; "" of other widths and of what is trained in other ways."""
    row = model.row
    if model.weight_dtype != "float32" or model.split != "test":
        return ""
    for kind, fitted in FITTED.items():
        if row is fitted:
            return kind
    plain = Row(row.name, OTHERS, row.sparsity, pruner=PICKS)
    return "picks" if row.settings() == plain.settings() else ""


def _dense_and_small(section: AccuracySection) -> tuple[Size, Size] | None:
    dense, small = _size(section, DENSE), _size(section, SMALL)
    return None if dense is None or small is None else (dense, small)


def _size(section: AccuracySection, row: Row) -> Size | None:
    model = model_of(section, row)
    return None if model is None or model.split != "test" else _size_of(section, model)


def _size_of(section: AccuracySection, model: ModelSummary) -> Size:
    return Size(model.parameters, model.metric(section.metrics[0]).mean)
