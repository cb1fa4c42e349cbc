"""The models that are compared; each is a row of the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

SEEDS = (0, 1, 2)  # of a headline row; the others have the first
HEADLINE, PATTERNS, BLOCKS, MASKS, SCHEDULES, PENALTIES, LEVELS = (
    "headline", "patterns", "blocks", "masks", "schedules", "penalties", "sparsities",
)  # fmt: skip
SENSITIVITY = "sensitivity: "  # and the argument that is varied


@dataclasses.dataclass(frozen=True)
class Row:
    """A model and how it is pruned.

    Attributes:
        name: in the table.
        family: rows of one family stand together.
        sparsity: wanted of the recurrent layer; None: the model stays dense. A wider one is pruned further, until as
            many recurrent weights are left as in the one of normal width.
        width: of the layer, as a multiple of the task's; None: as wide as a dense model can be with as many parameters
            in all as the pruned one has left.
        schedule: "PolynomialDecay", "ThresholdRamp" or "OneShot".
        fractions: arguments of the schedule that are steps, as fractions of all steps; those of `for_training` without.
        arguments: further ones of the schedule; "quantile" of a ThresholdRamp is what q is in a dense model.
        pruner: arguments of the Pruner, "picks" or "block_size" in place of its pattern.
        gates: sparsity of each gate, in place of one for all.
        penalty: "l1" or "group_lasso", added to the loss until pruning has ended, times `strength`.
        taught: whether the dense model of the same seed is its teacher.
        weight_dtypes: in which converted models are stored.
        x: where a row about sensitivity is drawn.
    """

    name: str
    family: str
    sparsity: float | None = 0.9
    width: float | None = 1.0
    schedule: str = "PolynomialDecay"
    fractions: Mapping[str, float] = dataclasses.field(default_factory=dict)
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pruner: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    penalty: str | None = None
    strength: float = 0.0
    taught: bool = False
    weight_dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    x: float = 0.0

    @property
    def is_dense(self) -> bool:
        return self.sparsity is None

    @property
    def seeds(self) -> tuple[int, ...]:
        return SEEDS if self.family in (HEADLINE, PATTERNS) else SEEDS[:1]

    def settings(self) -> dict[str, Any]:
        """What decides the outcome, for JSON."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for shown in ("name", "family", "weight_dtypes", "x"):
            del settings[shown]
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in settings.items()}


def _blocks(block_rows: int, block_columns: int) -> Row:
    block = (block_rows, block_columns)
    return Row(f"90 % in {block_rows}x{block_columns} blocks", BLOCKS, pruner={"block_size": list(block)})


def _level(sparsity: float) -> Row:
    return Row(f"{100 * sparsity:g} %", LEVELS, sparsity)


def _ramp(quantile: float) -> Row:
    percent = f"q at {100 * quantile:g} %"
    return Row(f"ThresholdRamp, {percent}", SCHEDULES, schedule="ThresholdRamp", arguments={"quantile": quantile})


DENSE = Row("dense", HEADLINE, None, weight_dtypes=(torch.float32, torch.float16))
SMALL = Row("small dense, as many parameters", HEADLINE, None, None)
GRADUAL = Row("gradual, 90 %", HEADLINE, weight_dtypes=(torch.float32, torch.float16, torch.int8))
WIDE = Row("1.5 times wider, as many recurrent weights", HEADLINE, width=1.5)
RAMP = _ramp(0.95)
ONE_SHOT = Row("hard pruning, 90 %", HEADLINE, schedule="OneShot", fractions={"step": 0.275})

SINGLE = dataclasses.replace(_blocks(1, 1), family=PATTERNS)
PATTERN_ROWS: tuple[Row, ...] = (
    Row("90 % in picks", PATTERNS, pruner={"picks": [16, 32]}),
    Row("90 % in picks, not balanced", PATTERNS, pruner={"picks": [16, 32], "balanced": False}),
    SINGLE,
)

OTHERS: tuple[Row, ...] = (
    _blocks(8, 1),
    _blocks(16, 4),
    _blocks(16, 16),
    Row("score max", MASKS, pruner={"score": "max"}),
    Row("tie_gates", MASKS, pruner={"tie_gates": True}),
    Row("balanced", MASKS, pruner={"balanced": True}),
    Row("weight_hh only, 90 %", MASKS, pruner={"targets": {"*weight_ih*": None}}),
    Row("r and z 95 %, n 80 %", MASKS, gates={"r": 0.95, "z": 0.95, "n": 0.8}),
    _ramp(0.9),
    RAMP,
    Row(
        "L1, then hard pruning, 1x1", PENALTIES, schedule="OneShot", fractions={"step": 0.5},
        pruner={"block_size": [1, 1]}, penalty="l1", strength=1e-5,
    ),
    Row("group lasso and gradual", PENALTIES, penalty="group_lasso", strength=3e-5),
    Row("small dense, taught by the dense model", PENALTIES, None, None, taught=True),
    _level(0.8),
    _level(0.95),
)  # fmt: skip


def _varied(argument: str, values: Sequence[float], **others: Any) -> tuple[Row, ...]:
    """Rows in which one argument, a fraction of the steps, is varied."""
    family = SENSITIVITY + argument
    return tuple(
        Row(f"{argument} {100 * value:g} %", family, fractions={argument: value}, x=value, **others) for value in values
    )


VARIED: tuple[Row, ...] = (
    *_varied("begin_step", (0.0, 0.2, 0.35)),
    *_varied("end_step", (0.2, 0.35, 0.7, 0.9)),
    *_varied("frequency", (1 / 800, 0.00375, 0.1, 0.225)),
    *_varied("ramp_step", (0.1, 0.4), schedule="ThresholdRamp", arguments={"quantile": 0.95}),
    Row("power 1", SENSITIVITY + "power", arguments={"power": 1.0}, x=1.0),
)
ROWS: tuple[Row, ...] = (DENSE, SMALL, GRADUAL, WIDE, ONE_SHOT, *PATTERN_ROWS, *OTHERS, *VARIED)

SELECTIONS = {
    "headline": ROWS[:5],
    "patterns": (SMALL, GRADUAL, *PATTERN_ROWS),
    "others": OTHERS,
    "sensitivity": VARIED,
    "all": ROWS,
}
