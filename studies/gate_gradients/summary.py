"""Runs of one row taken together: means, and differences to the dense run of the same seed and steps."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from studies.gate_gradients.rows import DENSE, ROWS, Row
from studies.runs.records import Lines
from studies.runs.sections import OTHER, Section, sections
from studies.runs.spread import Spread
from studies.tasks.task import Metric

KNOWN = {row.name: row for row in ROWS}


class RowSummary(NamedTuple):
    """A row over all its seeds; shares from 0 to 1.

    Attributes:
        quality: by metric.
        minus_dense: by metric, of the seeds that have a dense run; None if there is no such seed.
        zeros: {gate: {"start", "middle", "end", "mean"}}, {} for a dense row.
        redundant: {"rnn", "model"}.
        thresholds: the different fixed ones, in units of the gradient of the summed loss.
    """

    name: str
    family: str
    label: str
    seeds: int
    quality: dict[str, Spread]
    minus_dense: dict[str, Spread | None]
    zeros: dict[str, dict[str, float]]
    redundant: dict[str, float]
    thresholds: tuple[float, ...]

    @property
    def mean_zeros(self) -> float:
        return statistics.fmean(shares["mean"] for shares in self.zeros.values()) if self.zeros else 0.0


GateSection = Section[RowSummary]


def rows_of(lines: Lines) -> list[GateSection]:
    """Return sections with a summary of every row, in the order of ROWS."""
    return sections(lines.runs, [*KNOWN], _summarize, baseline=DENSE.name)


def _summarize(
    runs: Sequence[dict[str, Any]], dense: Mapping[int, dict[str, Any]], metrics: Sequence[Metric]
) -> Iterator[RowSummary]:
    name = runs[0]["row"]
    known = KNOWN.get(name, Row(name, OTHER, name))
    keys = [metric.key for metric in metrics]
    paired = [(run["quality"], dense[run["seed"]]["quality"]) for run in runs if run["seed"] in dense]
    yield RowSummary(
        name=name,
        family=known.family,
        label=known.label,
        seeds=len(runs),
        quality=Spread.by_key(run["quality"] for run in runs),
        minus_dense={key: Spread.of(own[key] - other[key] for own, other in paired) for key in keys},
        zeros={
            gate: {part: statistics.fmean(run["zeros"][gate][part] for run in runs) for part in parts}
            for gate, parts in runs[0]["zeros"].items()
        },
        redundant={what: statistics.fmean(run["redundant_macs"][what] for run in runs) for what in ("rnn", "model")},
        thresholds=tuple({run["gate_gradient"]["threshold"] for run in runs if "threshold" in run["gate_gradient"]}),
    )
