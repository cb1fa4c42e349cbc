"""Two pictures: what models cost against what they save, and how much the steps of a schedule matter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from bench.accuracy.rows import (
    BLOCKS,
    DENSE,
    GRADUAL,
    HEADLINE,
    LEVELS,
    MASKS,
    ONE_SHOT,
    PENALTIES,
    SCHEDULES,
    SENSITIVITY,
    SMALL,
    WIDE,
)
from bench.accuracy.summary import FLOAT32, ModelSummary, Section, Times, sections
from bench.runs.labels import Label, place_labels
from bench.runs.records import Key
from triton_sparse_rnn.demo.plots import INK, PALE, new_figure, strip

STYLES = {  # by family: colour, marker
    HEADLINE: ("#d9480f", "o"),
    LEVELS: ("#f76707", "."),
    BLOCKS: ("#1c7ed6", "s"),
    MASKS: ("#2f9e44", "^"),
    SCHEDULES: ("#862e9c", "D"),
    PENALTIES: ("#74838f", "v"),
}
SHORT = {  # labels of the rows that are named
    DENSE.name: "dense",
    SMALL.name: "small dense",
    GRADUAL.name: "gradual 90 %",
    WIDE.name: "wider, pruned",
    ONE_SHOT.name: "hard 90 %",
    "r and z 95 %, n 80 %": "r, z 95 %, n 80 %",
    "weight_hh only, 90 %": "weight_hh only",
}
PANELS = {  # arguments of a schedule that are varied: axis, where the default lies
    "begin_step": ("begin, % of the steps (end 50 %)", 5.0),
    "end_step": ("end, % of the steps (begin 5 %)", 50.0),
    "frequency": ("steps between updates, % of the steps", 2.25),
    "power": ("power of PolynomialDecay", 3.0),
}
Value = Callable[[ModelSummary], float | None]


def plot_all(runs: Mapping[Key, dict[str, Any]], times: Times, folder: Path) -> list[Path]:
    """Write accuracy-parameters.png, accuracy-time.png if layers were timed, and accuracy-schedule-TASK.png."""
    folder.mkdir(parents=True, exist_ok=True)
    found = sections(runs, times)
    paths = [folder / "accuracy-parameters.png"]
    plot_trade_off(found, lambda model: model.parameters, "parameters that are not zero", paths[0])
    if times:
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


def plot_trade_off(found: Sequence[Section], value: Value, axis: str, path: Path) -> None:
    """Draw for each task the first metric over what `value` tells of a model, on a logarithmic axis."""
    figure = new_figure(5.2 * len(found), 5.2)
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    labels = [_draw_models(axes, section, value) for axes, section in zip(panels, found, strict=True)]
    for axes in panels:
        axes.set_xlabel(axis, color=INK)
    entries = {text: handle for axes in panels for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), frameon=False, fontsize=9, loc="outside lower center", ncols=6)
    figure.draw_without_rendering()  # now the panels have their places
    for axes, own in zip(panels, labels, strict=True):
        place_labels(axes, own)
    figure.savefig(path)


def _draw_models(axes: Axes, section: Section, value: Value) -> list[Label]:
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
        x, y = [at for at, _, _ in points], [spread.mean for _, spread, _ in points]
        errors = np.array([(spread.mean - spread.low, spread.high - spread.mean) for _, spread, _ in points]).T
        axes.errorbar(x, y, errors, color=colour, linestyle="none", capsize=3)
        axes.plot(x, y, color=colour, marker=marker, markersize=6, linestyle="none", label=family)
        labels += [Label(SHORT[name], at, s.mean, colour) for at, s, name in points if name in SHORT]
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:,.0f}" if at >= 10 else f"{at:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.15, y=0.12)
    axes.set_ylabel(metric.heading, color=INK)
    axes.set_title(f"{section.task}, {section.steps:,} steps", loc="left", color=INK, fontsize=11)
    strip(axes, labelsize=8)
    return labels


def plot_sensitivity(section: Section, path: Path) -> None:
    """Draw the first metric over each argument of the schedule, with the spread of the default's seeds behind it."""
    metric = section.metrics[0]
    default = section.model(GRADUAL)
    figure = new_figure(3.3 * len(PANELS), 3.6)
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (argument, (label, default_at)) in zip(panels, PANELS.items(), strict=True):
        scale = 1.0 if argument == "power" else 100.0
        points = [
            (scale * model.row.x, model.quality[metric.key].mean)
            for model in section.models
            if model.row.family == SENSITIVITY + argument
        ]
        if default is not None:
            spread = default.quality[metric.key]
            axes.axhspan(spread.low, spread.high, color=PALE, alpha=0.3, linewidth=0, label="seeds of the default")
            run = next((r for r in section.runs if (r["row"], r["seed"]) == (GRADUAL.name, 0)), None)
            if run is not None:
                here = (default_at, run["models"][0]["quality"][metric.key])
                points.append(here)
                axes.plot(*here, color=STYLES[HEADLINE][0], marker="o", linestyle="none", zorder=3, label="default")
        x, y = zip(*sorted(points), strict=True) if points else ((), ())
        axes.plot(x, y, color=INK, marker=".", linewidth=1, label="one seed, that of the default")
        axes.set_xlabel(label, color=INK, fontsize=9)
        strip(axes, labelsize=8)
    panels[0].set_ylabel(metric.heading, color=INK)
    handles, texts = panels[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    title = f"{section.task}, {section.steps:,} steps, 90 % in 16x1 blocks: how much the steps of the schedule matter"
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=11)
    figure.savefig(path)
