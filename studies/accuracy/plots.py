"""Two pictures: what models cost against what they save, and how much the steps of a schedule matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from studies.accuracy.rows import (
    BLOCKS,
    DENSE,
    GRADUAL,
    HEADLINE,
    LEVELS,
    MASKS,
    ONE_SHOT,
    PATTERNS,
    PENALTIES,
    RAMP,
    SCHEDULES,
    SEEDS,
    SENSITIVITY,
    SINGLE,
    SMALL,
    WIDE,
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

STYLES = {  # by family: colour, marker
    HEADLINE: (ORANGE, "o"),
    LEVELS: ("#f76707", "."),
    PATTERNS: ("#c2255c", "P"),
    BLOCKS: (BLUE, "s"),
    MASKS: (GREEN, "^"),
    SCHEDULES: ("#862e9c", "D"),
    PENALTIES: ("#74838f", "v"),
}
SHORT = {  # labels of the rows that are named
    DENSE.name: "dense",
    SMALL.name: "small dense",
    GRADUAL.name: "90 % in 16x1",
    "90 % in picks": "picks",
    SINGLE.name: "single weights",
    WIDE.name: "wider, pruned",
    ONE_SHOT.name: "hard 90 %",
    "r and z 95 %, n 80 %": "r, z 95 %, n 80 %",
    "weight_hh only, 90 %": "weight_hh only",
}


class Panel(NamedTuple):
    """An argument of a schedule that is varied: its axis, the row that has the default, and where that lies."""

    axis: str
    default: Row
    at: float


PANELS = {
    "begin_step": Panel("begin, % of the steps (end 50 %)", GRADUAL, 5.0),
    "end_step": Panel("end, % of the steps (begin 5 %)", GRADUAL, 50.0),
    "frequency": Panel("steps between updates, % of the steps", GRADUAL, 2.25),
    "power": Panel("power of PolynomialDecay", GRADUAL, 3.0),
    "ramp_step": Panel("ramp of a ThresholdRamp, % of the steps", RAMP, 25.0),
    "q": Panel("q of a ThresholdRamp, % of dense blocks", RAMP, 95.0),
    "final_sparsity": Panel("final sparsity of PolynomialDecay, %", GRADUAL, 90.0),
}
PANELS_IN_A_LINE = 4  # that share the metric's axis
Value = Callable[[ModelSummary], float | None]


def plot_all(lines: Lines, folder: Path) -> list[Path]:
    """Write accuracy-parameters.png, accuracy-time.png if layers were timed, and accuracy-schedule-TASK.png."""
    found = models_of(lines)
    paths = [folder / "accuracy-parameters.png"]
    plot_trade_off(found, lambda model: model.parameters, "parameters that are not zero", paths[0])
    if lines.times:
        paths.append(folder / "accuracy-time.png")
        plot_trade_off(found, shipped_us, "µs per step of the layer, batch 1, one thread", paths[-1])
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


def plot_trade_off(found: Sequence[AccuracySection], value: Value, axis: str, path: Path) -> None:
    """Draw for each task the first metric over what `value` tells of a model, on a logarithmic axis."""

    def draw(axes: Axes, section: AccuracySection) -> list[Label]:
        axes.set_xlabel(axis, color=INK)
        return _draw_models(axes, section, value)

    plot_side_by_side(found, draw, (5.2, 5.2), 6, path)


def _draw_models(axes: Axes, section: AccuracySection, value: Value) -> list[Label]:
    """Draw points; return what is to be written beside them."""
    metric = section.metrics[0]
    labels = []
    for family, (colour, marker) in STYLES.items():
        points = [
            (at, model.quality[metric.key], model.row.name)
            for model in section.models
            if model.row.family == family and model.weight_dtype == FLOAT32 and (at := value(model)) is not None
        ]
        if not points:
            continue
        x, spreads, _ = zip(*points, strict=True)
        draw_points(axes, x, spreads, colour=colour, marker=marker, label=family)
        labels += [Label(SHORT[name], at, s.mean, colour) for at, s, name in points if name in SHORT]
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:,.0f}" if at >= 10 else f"{at:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.15, y=0.12)
    axes.set_ylabel(metric.heading, color=INK)
    axes.set_title(section.title, loc="left", color=INK, fontsize=11)
    strip(axes)
    return labels


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
    points = [(x, m.quality[metric.key].mean) for m in section.models if (x := _place(argument, m.row)) is not None]
    default = model_of(section, panel.default)
    if default is not None:
        spread = default.quality[metric.key]
        axes.axhspan(spread.low, spread.high, color=PALE, alpha=0.3, linewidth=0, label="seeds of the default")
        run = next((r for r in section.runs if (r["row"], r["seed"]) == (panel.default.name, SEEDS[0])), None)
        if run is not None:
            here = (panel.at, run["models"][0]["quality"][metric.key])
            points.append(here)
            axes.plot(*here, color=STYLES[HEADLINE][0], marker="o", linestyle="none", zorder=3, label="default")
    x, y = zip(*sorted(points), strict=True) if points else ((), ())
    axes.plot(x, y, color=INK, marker=".", linewidth=1, label="varied: the default's first seed, or a mean")
    axes.set_xlabel(panel.axis, color=INK, fontsize=9)
    strip(axes)


def _place(argument: str, row: Row) -> float | None:
    """Return where a row is drawn in the panel of an argument; None: it is not."""
    if row.family == SENSITIVITY + argument:
        return row.x if argument == "power" else 100 * row.x
    if argument == "final_sparsity" and row.family == LEVELS and row.sparsity is not None:
        return 100 * row.sparsity
    if argument == "q" and row.family == SCHEDULES and row is not RAMP:
        return 100 * row.arguments["quantile"]
    return None
