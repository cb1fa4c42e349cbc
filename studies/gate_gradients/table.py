"""The runs as Markdown."""

from __future__ import annotations

from collections.abc import Mapping

from studies.gate_gradients.rows import DENSE
from studies.gate_gradients.summary import GateSection, RowSummary, rows_of
from studies.runs.records import Lines
from studies.runs.sections import origin
from studies.runs.spread import Spread, markdown
from studies.tasks.task import Metric

GATE_NOTE = (
    "Zeros of each gate, %: in the first tenth of the steps, in the tenth around the middle, in the last tenth, and in "
    "brackets the mean of all steps."
)
THRESHOLD_NOTE = (
    "Fixed thresholds are in units of the gradient of the summed loss: the quantiles of a dense run's gate gradients "
    "after a tenth of its steps."
)


def tables(lines: Lines) -> str:
    """Return for each task what the rows cost and save, and the zeros of each gate."""
    return "\n\n".join(_section(section) for section in rows_of(lines))


def _section(section: GateSection) -> str:
    first, *others = section.metrics
    headings = ["gate gradients", "zeros, %", "redundant, LSTM, %", "redundant, model, %", first.heading, "minus dense"]
    headings += [f"{metric.heading} (minus dense)" for metric in others]
    costs = [
        [
            _name(row),
            _percent(row.mean_zeros),
            _percent(row.redundant["rnn"]),
            _percent(row.redundant["model"]),
            f"{row.quality[first.key].mean:.{first.digits}f}",
            "" if row.name == DENSE.name else _difference(row.minus_dense[first.key], first),
            *(_value_and_difference(row, metric) for metric in others),
            str(row.seeds),
        ]
        for row in section.models
    ]
    parts = [f"## {section.title}", markdown([*headings, "seeds"], costs)]
    parts += _noise(section)
    sparse = [row for row in section.models if row.zeros]
    if sparse:
        gates = list(sparse[0].zeros)
        zeros = [[_name(row), *(_over_time(row.zeros[gate]) for gate in gates)] for row in sparse]
        parts += [GATE_NOTE, markdown(["gate gradients", *gates], zeros)]
    if any(row.thresholds for row in section.models):
        parts.append(THRESHOLD_NOTE)
    return "\n\n".join([*parts, f"{len(section.runs)} runs, {origin(section.runs)}"])


def _name(row: RowSummary) -> str:
    return row.name + "".join(f", {threshold:.2g}" for threshold in row.thresholds)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _difference(spread: Spread | None, metric: Metric) -> str:
    return "" if spread is None else spread.text(metric.digits, sign=True)


def _value_and_difference(row: RowSummary, metric: Metric) -> str:
    value, difference = f"{row.quality[metric.key].mean:.{metric.digits}f}", row.minus_dense[metric.key]
    return value if row.name == DENSE.name or difference is None else f"{value} ({difference.mean:+.{metric.digits}f})"


def _over_time(shares: Mapping[str, float]) -> str:
    start, middle, end, mean = (f"{100 * shares[part]:.0f}" for part in ("start", "middle", "end", "mean"))
    return f"{start} → {middle} → {end} ({mean})"


def _noise(section: GateSection) -> list[str]:
    """Say how far dense runs of different seeds are from each other."""
    metric = section.metrics[0]
    dense = next((row.quality[metric.key] for row in section.models if row.name == DENSE.name), None)
    if dense is None or dense.seeds < 2:
        return []
    low, high, apart = (f"{value:.{metric.digits}f}" for value in (dense.low, dense.high, dense.high - dense.low))
    return [f"Dense runs of {dense.seeds} seeds: {low} to {high}, {apart} apart. Of several seeds: mean (range)."]
