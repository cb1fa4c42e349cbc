"""The runs as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from studies.accuracy.rows import DENSE, GRADUAL, ONE_SHOT, RAMP, SENSITIVITY, SMALL, WIDE, Row
from studies.accuracy.summary import FLOAT32, AccuracySection, model_of, models_of
from studies.runs.records import Key, Lines
from studies.runs.sections import origin
from studies.runs.spread import Spread, markdown

CLAIMS = (  # what the paper says, the model, and what it is compared with
    ("pruned, same width: 14 to 21 % worse than dense", GRADUAL, DENSE),
    ("1.4 to 1.7 times wider, pruned: 4 % better to 2 % worse than dense", WIDE, DENSE),
    ("hard pruning: 7 to 9 % worse than gradual", ONE_SHOT, GRADUAL),
    ("small dense: 36 % worse than dense", SMALL, DENSE),
    ("small dense: worse than pruned", SMALL, GRADUAL),
)


def tables(lines: Lines) -> str:
    """Return an overview, the models of each task, the papers' claims, sensitivities, and forecasts."""
    found = models_of(lines)
    parts = ["## Worse than dense, %", _overview(found)]
    parts += [part for section in found for part in _section(section)]
    parts += ["## The papers' claims", _claims(found), *(part for section in found for part in _sensitivity(section))]
    return "\n\n".join([*parts, "## Forecast and outcome", _forecasts(lines.runs)])


def _overview(found: Sequence[AccuracySection]) -> str:
    """Return a line for each model that is not dense, and a column for each task."""
    shown = [model for section in found for model in section.models if not model.row.family.startswith(SENSITIVITY)]
    names = dict.fromkeys(model.name for model in shown if model.row is not DENSE)
    cells = []
    for name in names:
        by_task = [next((model for model in section.models if model.name == name), None) for section in found]
        cells.append([name, *("" if model is None else _percent(model.loss_percent) for model in by_task)])
    return markdown(["model", *(section.title for section in found)], cells)


def _section(section: AccuracySection) -> list[str]:
    first, *others = section.metrics
    headings = ["model", "units", "zeros, %", first.heading, "worse than dense, %", *(m.heading for m in others)]
    headings += ["parameters", "bytes of the file", "µs per step", "by nn.GRU", "seeds"]
    cells = [
        [
            model.name,
            str(model.hidden_size),
            f"{100 * model.sparsity:.1f}",
            model.quality[first.key].text(first.digits),
            "" if model.row is DENSE and model.weight_dtype == FLOAT32 else _percent(model.loss_percent),
            *(f"{model.quality[metric.key].mean:.{metric.digits}f}" for metric in others),
            f"{model.parameters:,.0f}",
            f"{model.nbytes:,.0f}",
            _microseconds(model.us_per_step),
            _microseconds(model.torch_us_per_step),
            str(model.quality[first.key].seeds),
        ]
        for model in section.models
        if not model.row.family.startswith(SENSITIVITY)
    ]
    return [f"## {section.title}", markdown(headings, cells), f"{len(section.runs)} runs, {origin(section.runs)}"]


def _percent(spread: Spread | None) -> str:
    return "" if spread is None else spread.text(1, sign=True)


def _microseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _claims(found: Sequence[AccuracySection]) -> str:
    """Compare pairs of models by the first metric, seed by seed."""
    cells = [[claim, *(_percent(_worse(section, row, other)) for section in found)] for claim, row, other in CLAIMS]
    return markdown(["the paper", *(f"here, {section.task}, %" for section in found)], cells)


def _worse(section: AccuracySection, row: Row, other: Row) -> Spread | None:
    """Return by how much one row is worse than another, in % of the other, over the seeds that both have."""
    key = section.metrics[0].key
    quality = {(run["row"], run["seed"]): run["models"][0]["quality"][key] for run in section.runs}
    pairs = [
        (value, quality[other.name, seed])
        for (name, seed), value in quality.items()
        if name == row.name and (other.name, seed) in quality
    ]
    return Spread.of(100 * (value - base) / base for value, base in pairs)


def _sensitivity(section: AccuracySection) -> list[str]:
    """Return a table of the varied schedules, by how much each differs from its default, of the same seed."""
    varied = [model for model in section.models if model.row.family.startswith(SENSITIVITY)]
    default = model_of(section, GRADUAL)
    if not varied or default is None:
        return []
    first = section.metrics[0]
    cells = [
        [
            model.row.family.removeprefix(SENSITIVITY),
            model.name,
            f"{100 * model.sparsity:.1f}",
            model.quality[first.key].text(first.digits),
            _percent(_worse(section, model.row, RAMP if model.row.schedule == RAMP.schedule else GRADUAL)),
        ]
        for model in varied
    ]
    spread = default.quality[first.key]
    return [
        f"## Sensitivity to the schedule, {section.task}",
        f"`PolynomialDecay.for_training` ({GRADUAL.name}): {spread.text(first.digits)}, {spread.seeds} seeds. "
        f"The default of ramp_step is {RAMP.name}.",
        markdown(["varied", "schedule", "zeros, %", first.heading, "worse than the default, same seed, %"], cells),
    ]


def _forecasts(runs: Mapping[Key, dict[str, Any]]) -> str:
    """Return a line for each row of a task: what was forecast of the pruned weights, and what they became."""
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key, run in runs.items():
        if run["forecast"]:
            grouped.setdefault((key.task, key.row), []).append(run)
    cells = []
    for (task, row), group in grouped.items():
        told, became = ([100 * run[what]["sparsity"] for run in group] for what in ("forecast", "became"))
        sizes = [100 * (run["forecast"]["nbytes"] / run["became"]["nbytes"] - 1) for run in group]
        errors = Spread.of(a - b for a, b in zip(told, became, strict=True))
        assert errors is not None
        pruner = group[0]["pruner"]
        pattern = pruner["pattern"] if "pattern" in pruner else "x".join(map(str, pruner["block_size"]))
        mean_told, mean_became = (sum(values) / len(values) for values in (told, became))
        of_bytes = f"{sum(sizes) / len(sizes):+.1f}"
        sparsities = (f"{mean_told:.1f}", f"{mean_became:.1f}", errors.text(1, sign=True))
        cells.append([task, row, pattern, *sparsities, of_bytes, str(len(group))])
    headings = ["task", "model", "pattern", "forecast, % zeros", "became", "error, points", "error of bytes, %", "runs"]
    return markdown(headings, cells)
