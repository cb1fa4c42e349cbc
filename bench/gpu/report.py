"""What the suites of layers measured on a GPU: a table with a line for each layer, and the goals.

Times are medians of the device's clock. Ratios in the table compare like with like, both eager or both replayed from a
CUDA graph. The goals take the fastest way of each side, whichever that is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from bench.rows import Row, markdown

SUITES = ("bench_smoke", "bench_core", "bench_grid")
GRAPH = ", CUDA graph"
HEADINGS = (
    "layer", "ours", "ours, graph", "0 % zeros, graph", "nn", "nn, graph", "nn in float16, graph", "torch BSR",
    "floor: exchange", "floor: bytes", "W_ih x", "ratio", "ratio, graph", "largest error", "kernels",
)  # fmt: skip


class Layer(NamedTuple):
    """The rows of one workload of one suite."""

    group: str
    rows: list[Row]

    def us_per_step(self, wanted: Callable[[str], bool]) -> float | None:
        """The time of the fastest contender of a wanted name; None if there is none."""
        return min((_device_us(row) / row.facts["T"] for row in self.rows if wanted(row.contender)), default=None)

    def time(self, *names: str) -> float | None:
        """Of the fastest of some contenders, microseconds a step; None if none was measured."""
        return self.us_per_step(lambda contender: contender in names)

    @property
    def ours(self) -> float | None:
        """Of our fastest way to run it, microseconds a step."""
        return self.us_per_step(lambda name: name.startswith("Persistent") and not name.endswith("zeros"))

    @property
    def ratio(self) -> float | None:
        """How many times as fast ours is as the fastest way of torch.nn."""
        return _quotient(self.us_per_step(lambda name: name.startswith("nn.")), self.ours)

    def fact(self, name: str) -> float | None:
        """A fact that one of its contenders has, microseconds of a call, as those of a step."""
        return next((row.facts[name] / row.facts["T"] for row in self.rows if name in row.facts), None)

    def has(self, **facts: object) -> bool:
        """Whether it is of these sizes."""
        return all(self.rows[0].facts.get(name) == value for name, value in facts.items())


def layers_of(rows: Sequence[Row]) -> list[Layer]:
    """Return the layers of the GPU suites, in order."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.suite in SUITES:
            groups.setdefault((row.suite, row.group), []).append(row)
    return [Layer(group, members) for (_, group), members in groups.items()]


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table, a line for each layer, in microseconds a step; then the machine."""
    layers = layers_of(rows)
    machines = dict.fromkeys(_machine(row) for layer in layers for row in layer.rows)
    lines = markdown(HEADINGS, map(_cells, layers))
    return "\n".join([lines, "", "Microseconds a step, medians of the device's clock.", *machines])


def comparison(layer: Layer) -> str:
    """Return a layer in one line: ours beside torch.nn, both eager and both replayed from a CUDA graph."""
    name = layer.rows[0].facts["cell"].partition("_")[0]
    parts = []
    for how, suffix in (("eager", ""), ("CUDA graph", GRAPH)):
        ours, nn = layer.time(f"Persistent{name}{suffix}"), layer.time(f"nn.{name}{suffix}")
        times = " against ".join("not measured" if us is None else f"{us:.2f}" for us in (ours, nn))
        parts.append(f"{how} {times}" + (f" ({nn / ours:.2f}x)" if ours and nn else ""))
    return f"{layer.group}: {', '.join(parts)} µs a step, ours against torch.nn"


def _cells(layer: Layer) -> list[str]:
    name = layer.rows[0].facts["cell"].partition("_")[0]
    ours, nn, bsr = f"Persistent{name}", f"nn.{name}", "torch BSR per step"

    time = layer.time
    eager, replayed = (time(nn), time(ours)), (time(nn + GRAPH), time(ours + GRAPH))
    times = [eager[1], replayed[1], time(f"{ours}{GRAPH}, 0 % zeros"), eager[0], replayed[0]]
    times += [time(f"{nn}, float16{GRAPH}"), time(bsr, bsr + GRAPH), time("floor: exchange")]
    times += [layer.fact("bytes_us"), layer.fact("projection_us")]
    ratios = [_quotient(*eager), _quotient(*replayed)]
    numbers = [_number(value, 3) for value in times] + [_number(value, 2) for value in ratios]
    own = [row.facts for row in layer.rows if row.contender in (ours, ours + GRAPH)]
    error = f"{max(facts['max_error'] for facts in own):.1e}" if own else ""
    return [layer.group, *numbers, error, own[0]["tile"] if own else ""]


def _machine(row: Row) -> str:
    facts = row.facts
    versions = ", ".join(f"{name} {facts[name]}" for name in ("driver", "cuda", "cudnn", "torch", "triton", "python"))
    return f"{facts['gpu']}: {facts['sms']} SMs, copies at {facts['copy_bandwidth'] / 1e12:.2f} TB/s; {versions}."


class Goal(NamedTuple):
    """What a GRU layer is to reach at batch 1: a time of a step, or a ratio to torch.nn."""

    H: int
    sparsity: float
    most_us: float | None = None
    least_ratio: float | None = None

    def verdicts(self, layers: Sequence[Layer]) -> list[str]:
        """Return a line for each layer that it means: one of each dtype, say."""
        lines = [
            f"{'pass' if self._is_met(value) else 'FAIL'}  {self}: {value:.3g} in {layer.rows[0].facts['dtype']}"
            for layer in layers
            if self._means(layer) and (value := layer.ours if self.most_us else layer.ratio) is not None
        ]
        return lines or [f"not measured  {self}"]

    def __str__(self) -> str:
        wanted = f"<= {self.most_us:g} µs a step" if self.most_us else f">= {self.least_ratio:g} times torch.nn"
        return f"GRU H={self.H} B=1 {self.sparsity:.0%} zeros {wanted}"

    def _means(self, layer: Layer) -> bool:
        sizes = {"cell": "GRU", "H": self.H, "B": 1, "sparsity": self.sparsity}
        return layer.has(**sizes, block_size=[16, 1], masks="random") and not layer.has(T=1)

    def _is_met(self, value: float) -> bool:
        return value <= self.most_us if self.most_us else value >= (self.least_ratio or 0)


GOALS = (
    Goal(1024, 0.9, most_us=1.0),
    Goal(2560, 0.9, most_us=1.5),
    Goal(2560, 0.95, least_ratio=6.8),  # what the paper reached: Zhu et al. 2018
    Goal(1024, 0.9, least_ratio=10.0),
)


def goals(rows: Sequence[Row]) -> str:
    """Return what was wanted and what was measured, line by line, and every layer where ours is the slower one."""
    layers = layers_of(rows)
    return "\n".join([*(line for goal in GOALS for line in goal.verdicts(layers)), *_never_slower(layers)])


def _never_slower(layers: Sequence[Layer]) -> list[str]:
    goal = "never slower than torch.nn for H > 192 and B <= 16"
    compared = [(layer, ratio) for layer in layers if (ratio := layer.ratio) is not None]
    meant = [ratio for layer, ratio in compared if layer.rows[0].facts["H"] > 192 and layer.rows[0].facts["B"] <= 16]
    slower = [f"slower  {ratio:.2f} times as fast as torch.nn: {layer.group}" for layer, ratio in compared if ratio < 1]
    missing = [f"not measured  ours beside torch.nn: {layer.group}" for layer in layers if layer.ratio is None]
    if not meant:
        return [f"not measured  {goal}", *slower, *missing]
    wins = sum(ratio >= 1 for ratio in meant)
    return [f"{'pass' if wins == len(meant) else 'FAIL'}  {goal}: {wins} of {len(meant)} layers", *slower, *missing]


def _device_us(row: Row) -> float:
    return row.facts["device_us"]


def _quotient(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
