"""The ways to choose gate gradients that are compared; each is a row of the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

SEEDS = (0, 1, 2)  # of a headline row; the others have the first
CALIBRATION_SEED = SEEDS[0]  # of the dense run whose distribution fixed thresholds are taken from


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to choose.

    Attributes:
        name: in the table.
        family: rows of one family are drawn alike.
        label: beside its point in the plot.
        arguments: of GateGradientSparsity; none: the row is dense.
        headline: whether it is run with every seed.
        quantile: for a fixed threshold: the share of gate gradients below it early in a dense run.
        dense_end: share of the steps, at the end, that are dense.
    """

    name: str
    family: str
    label: str = ""
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    headline: bool = False
    quantile: float | None = None
    dense_end: float = 0.0

    @property
    def is_dense(self) -> bool:
        return not self.arguments and self.quantile is None

    @property
    def seeds(self) -> tuple[int, ...]:
        return SEEDS if self.headline else SEEDS[:1]

    def settings(self) -> dict[str, Any]:
        """What decides the outcome, for JSON."""
        return {"arguments": dict(self.arguments), "quantile": self.quantile, "dense_end": self.dense_end}

    def gate_gradient(
        self, *, seed: int, steps: int, loss_scale: float, thresholds: Mapping[float, float]
    ) -> dict[str, Any]:
        """Return all arguments of GateGradientSparsity.

        Args:
            thresholds: by quantile, in units of the gradient of the summed loss.
        """
        arguments = dict(self.arguments) | {"seed": seed}
        if self.quantile is not None:
            arguments |= {"threshold": thresholds[self.quantile], "loss_scale": loss_scale}
        if self.dense_end:
            arguments["end_step"] = steps - round(self.dense_end * steps)
        return arguments


def _elements(rule: str, target: float, *, headline: bool = False) -> Row:
    percent = f"{100 * target:g} %"
    return Row(f"{rule}, {percent}", rule, percent, {"target": target, "rule": rule}, headline)


def _fixed(quantile: float) -> Row:
    percent = f"about {100 * quantile:g} %"
    return Row(f"fixed threshold, {percent}", "fixed threshold", percent, quantile=quantile)


def _mixed(dense_steps: str, *, dense_end: float = 0.0, **others: int) -> Row:
    arguments = {"target": 0.9, "rule": "deterministic", **others}
    label = f"90 %, {dense_steps}"
    return Row(f"deterministic, {label}", "with dense steps", label, arguments, dense_end=dense_end)


DENSE = Row("dense", "dense", headline=True)
ROWS: tuple[Row, ...] = (
    DENSE,
    _elements("deterministic", 0.8, headline=True),
    _elements("deterministic", 0.85, headline=True),
    _elements("deterministic", 0.9, headline=True),
    _elements("stochastic", 0.8, headline=True),
    _elements("stochastic", 0.85, headline=True),
    _elements("stochastic", 0.9, headline=True),
    _elements("deterministic", 0.5),
    _elements("stochastic", 0.95),
    _fixed(0.5),
    _fixed(0.8),
    _fixed(0.9),
    _mixed("last 30 % dense", dense_end=0.3),
    _mixed("every other step dense", dense_every=2),
    Row(
        "blocks, stochastic 50 %",
        "structured",
        "blocks, stochastic",
        {"target": 0.5, "structure": "blocks", "rule": "stochastic"},
    ),
)
QUANTILES = tuple(row.quantile for row in ROWS if row.quantile is not None)
SELECTIONS = {"headline": tuple(row for row in ROWS if row.headline), "all": ROWS}
