"""Pictures: what models cost against what they save, at which width the gap closes, and what a schedule's steps do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from studies.accuracy.rows import (
    BLOCK,
    IN_BLOCKS,
    PICKS,
    PRUNED,
    RAMP,
    SCHEDULES,
    SEEDS,
    SENSITIVITY,
    Row,
)
from studies.accuracy.summary import FLOAT32, AccuracySection, ModelSummary, model_of, models_of
from studies.runs.figures import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PALE,
    Label,
    draw_points,
    legend_below,
    new_figure,
    plot_side_by_side,
    strip,
)
from studies.runs.records import Lines

STYLES = {  # of what weights a model has: colour, marker
    "dense": (INK, "o"),
    "picks": (ORANGE, "P"),
    "16x1 blocks": (BLUE, "s"),
    "single weights": (GREEN, "^"),
    "block-diagonal": ("#862e9c", "D"),
}
SHORT = {  # where a name in the table would be too long beside a point
    "small dense, taught by the dense model": "small, taught",
    "90 % in 16x1 blocks": "90 %",
    "90 % in picks": "90 %",
    "90 % in single weights": "90 %",
    "trained, then 90 % in picks": "trained, then 90 %",
    "trained, then 90 % in picks, taught by itself": "trained, then 90 %, taught by itself",
    "trained, then 90 % in 16x1 blocks, taught by itself": "trained, then 90 %, taught by itself",
    "90 % in picks, taught by the dense model": "90 %, taught",
    "90 % in picks at once": "90 % at once",
    "80 % in picks": "80 %",
    "95 % in picks": "95 %",
    "97 % in picks": "97 %",
    "dense, 2 times as wide": "2x as wide",
    "1.5 times as wide, 90 % in picks": "1.5x as wide, 90 %",
    "2 times as wide, 90 % in picks": "2x as wide, 90 %",
    "1.5 times as wide, as many weights in picks": "1.5x as wide, as many",
    "2 times as wide, as many weights in picks": "2x as wide, as many",
}


class Panel(NamedTuple):
    """An argument of a schedule that is varied: its axis, the row that has the default, and where that lies."""

    axis: str
    default: Row
    at: float


PANELS = {
    "begin_step": Panel("begin, % of the steps (end 50 %)", IN_BLOCKS, 5.0),
    "end_step": Panel("end, % of the steps (begin 5 %)", IN_BLOCKS, 50.0),
    "frequency": Panel("steps between updates, % of the steps", IN_BLOCKS, 2.25),
    "power": Panel("power of PolynomialDecay", IN_BLOCKS, 3.0),
    "ramp_step": Panel("ramp of a ThresholdRamp, % of the steps", RAMP, 25.0),
    "q": Panel("q of a ThresholdRamp, % of dense blocks", RAMP, 95.0),
}
PANELS_IN_A_LINE = 3  # that share the metric's axis
Value = Callable[[ModelSummary], float | None]


def plot_all(lines: Lines, folder: Path) -> list[Path]:
    """Write accuracy-time.png if layers were timed, accuracy-width.png and accuracy-schedule-TASK.png as rows allow."""
    found = models_of(lines)
    paths = []
    tested = [section for section in found if any(model.split == "test" for model in section.models)]
    if timed := [section for section in tested if any(shipped_us(model) is not None for model in section.models)]:
        paths.append(folder / "accuracy-time.png")
        plot_trade_off(timed, shipped_us, "µs per step of the layer, batch 1, one thread", paths[-1])
    if wide := [section for section in tested if any(model.row.width not in (1, None) for model in section.models)]:
        paths.append(folder / "accuracy-width.png")
        plot_side_by_side(wide, _draw_widths, (5.6, 4.6), 3, paths[-1])
    for section in found:
        varied = {model.row.family for model in section.models if model.row.family.startswith(SENSITIVITY)}
        if len(varied) > 1:
            paths.append(folder / f"accuracy-schedule-{section.task}.png")
            plot_sensitivity(section, paths[-1])
    return paths


def shipped_us(model: ModelSummary) -> float | None:
    """Time of the program that a user would take: nn.GRU or ours for a dense model, whichever is faster."""
    times = [time for time in (model.us_per_step, model.torch_us_per_step) if time is not None]
    return min(times, default=None)


def kind_of(row: Row) -> str:
    """What weights a model of a row has, as in STYLES."""
    if row.is_dense:
        return "dense"
    if row.diagonal:
        return "block-diagonal"
    return {"picks": "picks", "block_size": "16x1 blocks" if row.pruner == BLOCK else "single weights"}[
        next(iter(row.pruner))
    ]


def plot_trade_off(found: Sequence[AccuracySection], value: Value, axis: str, path: Path) -> None:
    """Draw for each task the first metric on the test split over what `value` tells of a model, logarithmic."""

    def draw(axes: Axes, section: AccuracySection) -> list[Label]:
        axes.set_xlabel(axis, color=INK)
        return _draw_models(axes, section, value)

    plot_side_by_side(found, draw, (5.6, 5.6), 5, path)


def _draw_models(axes: Axes, section: AccuracySection, value: Value) -> list[Label]:
    """Draw points; return what is to be written beside them."""
    metric = section.metrics[0]
    labels = []
    for kind, (colour, marker) in STYLES.items():
        points = [
            (at, model.metric(metric), model.row.name)
            for model in section.models
            if model.split == "test"
            and model.weight_dtype == FLOAT32
            and kind_of(model.row) == kind
            and (at := value(model)) is not None
        ]
        if not points:
            continue
        x, spreads, _ = zip(*points, strict=True)
        draw_points(axes, x, spreads, colour=colour, marker=marker, label=kind)
        labels += [Label(SHORT.get(name, name), at, spread.mean, colour) for at, spread, name in points]
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:,.0f}" if at >= 10 else f"{at:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.15, y=0.12)
    axes.set_ylabel(f"{metric.heading}, test", color=INK)
    axes.set_title(section.title, loc="left", color=INK, fontsize=11)
    strip(axes)
    return labels


def _draw_widths(axes: Axes, section: AccuracySection) -> list[Label]:
    """Draw by how much models of several widths are worse than the dense one of normal width, as lines."""
    own = [model for model in section.models if model.split == "test" and model.weight_dtype == FLOAT32]
    lines: dict[str, list[ModelSummary]] = {
        "dense": [model for model in own if model.row.is_dense and model.row.length == 1]
    }
    pruned = [model for model in own if model.row.pruner == PICKS and model.row.sparsity == PRUNED.sparsity]
    pruned = [model for model in pruned if model.row is PRUNED or model.row.width != 1]
    lines["90 % in picks"] = [model for model in pruned if not model.row.as_many_weights]
    lines["in picks, as many weights at every width"] = [
        model for model in pruned if model.row.as_many_weights or model.row is PRUNED
    ]
    for (name, models), (colour, marker) in zip(lines.items(), [(INK, "o"), (ORANGE, "P"), (BLUE, "s")], strict=True):
        worse = sorted(
            {model.hidden_size: model.worse for model in models if model.worse and not model.row.teaching}.items()
        )
        if worse:
            x, spreads = zip(*worse, strict=True)
            draw_points(axes, x, spreads, colour=colour, marker=marker, label=name)
            axes.plot(x, [spread.mean for spread in spreads], color=colour, linewidth=1)
    axes.axhline(0, color=PALE, linewidth=1)
    axes.set_xlabel("units of the layer", color=INK)
    axes.set_ylabel("worse than the dense layer of normal width, %", color=INK)
    axes.set_title(section.title, loc="left", color=INK, fontsize=11)
    strip(axes)
    return []


def plot_sensitivity(section: AccuracySection, path: Path) -> None:
    """Draw the first metric over each argument of the schedule, with the spread of the default's seeds behind it."""
    lines = -(-len(PANELS) // PANELS_IN_A_LINE)
    figure = new_figure(3.3 * PANELS_IN_A_LINE, 3.2 * lines)
    grid = figure.subplots(lines, PANELS_IN_A_LINE, sharey="row", squeeze=False)
    for axes, (argument, panel) in zip(grid.flat, PANELS.items(), strict=False):
        _draw_panel(axes, section, argument, panel)
    for axes in grid.flat[len(PANELS) :]:
        axes.set_visible(False)
    for line in grid:
        line[0].set_ylabel(section.metrics[0].heading, color=INK)
    legend_below(figure, [grid[0, 0]], 3)
    title = f"{section.title}, 16x1 blocks: how much the arguments of a schedule matter"
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=11)
    figure.savefig(path)


def _draw_panel(axes: Axes, section: AccuracySection, argument: str, panel: Panel) -> None:
    metric = section.metrics[0]
    found = [(x, model) for model in section.models if (x := _place(argument, model.row)) is not None]
    points = [(x, model.quality["validation"][metric.key].mean) for x, model in found]
    default = model_of(section, panel.default)
    if default is not None:
        spread = default.quality["validation"][metric.key]
        axes.axhspan(spread.low, spread.high, color=PALE, alpha=0.3, linewidth=0, label="seeds of the default")
        run = next((r for r in section.runs if (r["row"], r["seed"]) == (panel.default.name, SEEDS[0])), None)
        if run is not None:
            here = (panel.at, run["models"][0]["quality"]["validation"][metric.key])
            points.append(here)
            axes.plot(*here, color=ORANGE, marker="o", linestyle="none", zorder=3, label="default")
    x, y = zip(*sorted(points), strict=True) if points else ((), ())
    axes.plot(x, y, color=INK, marker=".", linewidth=1, label="varied: the default's first seed, or a mean")
    axes.set_xlabel(panel.axis, color=INK, fontsize=9)
    strip(axes)


def _place(argument: str, row: Row) -> float | None:
    """Return where a row is drawn in the panel of an argument; None: it is not."""
    if row.family == SENSITIVITY + argument:
        return row.x if argument == "power" else 100 * row.x
    if argument == "q" and row.family == SCHEDULES and row is not RAMP:
        return 100 * row.arguments["quantile"]
    return None
