"""The runs as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from studies.accuracy.rows import (
    DENSE,
    IN_BLOCKS,
    ONE_SHOT,
    PRUNED,
    RAMP,
    RECIPE,
    SELF_TAUGHT,
    SENSITIVITY,
    SMALL,
    WIDE,
    Row,
)
from studies.accuracy.rule import rule_of
from studies.accuracy.summary import FLOAT32, AccuracySection, ModelSummary, model_of, models_of, worse
from studies.runs.records import Key, Lines
from studies.runs.sections import origin
from studies.runs.spread import Spread, markdown

SAID = (  # what the papers say, the model, and what it is compared with
    ("pruned, same width: 14 to 21 % worse than dense", PRUNED, DENSE),
    ("the same in blocks", IN_BLOCKS, DENSE),
    ("1.4 to 1.7 times as wide, 90 %: 4 % better to 2 % worse than dense", WIDE, DENSE),
    ("hard pruning: 7 to 9 % worse than gradual", ONE_SHOT, PRUNED),
    ("small dense: 36 % worse than dense", SMALL, DENSE),
    ("small dense: worse than pruned", SMALL, PRUNED),
    ("the same, than in blocks", SMALL, IN_BLOCKS),
)


def tables(lines: Lines) -> str:
    """Return an overview, the models of each task, the papers' claims, what was chosen from, and forecasts."""
    found = models_of(lines)
    parts = ["## Worse than dense, %", _overview(found)]
    parts += [part for section in found for part in _section(section)]
    parts += ["## The papers' claims", _claims(found)]
    if rule := rule_of(found):
        parts += ["## A rule for what pruning costs", rule]
    parts += [part for section in found for part in (*_recipe(section), *_sensitivity(section))]
    return "\n\n".join([*parts, "## Forecast and outcome", _forecasts(lines.runs)])


def _is_shown(row: Row) -> bool:
    """Whether a row is among the models of its task, not in a table of what was chosen from."""
    return row.family != RECIPE and not row.family.startswith(SENSITIVITY)


def _overview(found: Sequence[AccuracySection]) -> str:
    """Return a line for each model that is not dense, and a column for each task."""
    shown = [model for section in found for model in section.models if _is_shown(model.row)]
    names = dict.fromkeys(model.name for model in shown if model.row is not DENSE)
    cells = []
    for name in names:
        by_task = [next((model for model in section.models if model.name == name), None) for section in found]
        cells.append([name, *("" if model is None else _percent(model.worse) for model in by_task)])
    return markdown(["model", *(section.title for section in found)], cells)


def _section(section: AccuracySection) -> list[str]:
    first, *others = section.metrics
    models = [model for model in section.models if _is_shown(model.row)]
    tested = any(model.split == "test" for model in models)
    headings = ["model", "units", "zeros, %", first.heading, "worse than dense, %", *(m.heading for m in others)]
    headings += ["on validation"] * tested
    headings += ["parameters", "bytes of the file", "µs per step", "by nn.GRU", "steps", "seconds", "seeds"]
    cells = [
        [
            model.name,
            str(model.hidden_size),
            f"{100 * model.sparsity:.1f}",
            model.metric(first).text(first.digits),
            "" if model.row is DENSE and model.weight_dtype == FLOAT32 else _percent(model.worse),
            *(f"{model.metric(metric).mean:.{metric.digits}f}" for metric in others),
            *[f"{model.quality['validation'][first.key].mean:.{first.digits}f}"] * tested,
            f"{model.parameters:,.0f}",
            f"{model.nbytes:,.0f}",
            _microseconds(model.us_per_step),
            _microseconds(model.torch_us_per_step),
            f"{model.trained_steps:,}",
            f"{model.seconds:,.0f}",
            str(model.metric(first).seeds),
        ]
        for model in models
    ]
    return [f"## {section.title}", markdown(headings, cells), f"{len(section.runs)} runs, {origin(section.runs)}"]


def _percent(spread: Spread | None) -> str:
    return "" if spread is None else spread.text(1, sign=True)


def _microseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _claims(found: Sequence[AccuracySection]) -> str:
    """Compare pairs of models by the first metric, seed by seed, on the test split."""
    cells = [[said, *(_percent(_worse(section, row, other, "test")) for section in found)] for said, row, other in SAID]
    return markdown(["the papers", *(f"here, {section.title}, %" for section in found)], cells)


def _worse(section: AccuracySection, row: Row, other: Row, split: str) -> Spread | None:
    """Return by how much one row is worse than another, in % of the other, over the seeds that both have."""
    runs = [run for run in section.runs if run["row"] == row.name and split in run["models"][0]["quality"]]
    others = {run["seed"]: run for run in section.runs if run["row"] == other.name}
    return worse(runs, others, split, section.metrics[0].key)


def _recipe(section: AccuracySection) -> list[str]:
    """Return a table of what the recipe was chosen from: by how much each differs from the row without it."""
    tried = [model for model in section.models if model.row.family == RECIPE]
    default = model_of(section, PRUNED)
    if not tried or default is None:
        return []
    return [
        f"## What the recipe was chosen from, {section.title}",
        f"On validation. {PRUNED.name}: {_on_validation(section, default)}. What is taught is compared with "
        f"{SELF_TAUGHT.name}.",
        _differences(section, tried),
    ]


def _sensitivity(section: AccuracySection) -> list[str]:
    """Return a table of the varied schedules, by how much each differs from its default, of the same seed."""
    varied = [model for model in section.models if model.row.family.startswith(SENSITIVITY)]
    default = model_of(section, IN_BLOCKS)
    if not varied or default is None:
        return []
    return [
        f"## Sensitivity to the schedule, {section.title}",
        f"On validation. `PolynomialDecay.for_training` ({IN_BLOCKS.name}): {_on_validation(section, default)}. "
        f"The default of ramp_step is {RAMP.name}.",
        _differences(section, varied),
    ]


def _on_validation(section: AccuracySection, model: ModelSummary) -> str:
    spread = model.quality["validation"][section.metrics[0].key]
    return f"{spread.text(section.metrics[0].digits)}, {spread.seeds} seed{'s' * (spread.seeds > 1)}"


def _default_of(row: Row) -> Row:
    """Return the row that one in which something is varied differs from."""
    if row.family == RECIPE:
        return PRUNED if row.teaching is None else SELF_TAUGHT
    return RAMP if row.schedule == RAMP.schedule else IN_BLOCKS


def _differences(section: AccuracySection, models: Sequence[ModelSummary]) -> str:
    first = section.metrics[0]
    cells = [
        [
            model.row.family.removeprefix(SENSITIVITY),
            model.name,
            f"{100 * model.sparsity:.1f}",
            model.quality["validation"][first.key].text(first.digits),
            _percent(_worse(section, model.row, _default_of(model.row), "validation")),
        ]
        for model in models
    ]
    return markdown(["varied", "model", "zeros, %", first.heading, "worse than the default, same seed, %"], cells)


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
