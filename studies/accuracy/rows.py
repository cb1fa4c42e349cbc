"""The models that are compared; each is a row of the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

SEEDS = (0, 1, 2)  # of a row that a claim rests on; the others have the first
CLAIMS, WIDTHS, OTHERS, RECIPE, BLOCKS, MASKS, SCHEDULES, PENALTIES = (
    "claims", "widths", "others", "recipe", "blocks", "masks", "schedules", "penalties",
)  # fmt: skip
SENSITIVITY = "sensitivity: "  # and the argument that is varied
Rate = Literal["falling", "held", "constant"]


@dataclasses.dataclass(frozen=True)
class Teaching:
    """What a teacher adds to the loss.

    Attributes:
        outputs: weight of the divergence of predictions.
        temperature: by which the scores of both are divided there.
        layers: weight of the distance of the recurrent layers' outputs, relative to their power.
    """

    outputs: float = 0.0
    temperature: float = 1.0
    layers: float = 0.0


@dataclasses.dataclass(frozen=True)
class Row:
    """A model and how it is pruned.

    Attributes:
        name: in the table.
        family: rows of one family stand together.
        sparsity: wanted of the recurrent layer; None: the model stays dense.
        width: of the layer, as a multiple of the task's; None: as wide as a dense model can be with as many parameters
            in all as the pruned one has left.
        as_many_weights: a model of another width, or with narrow inputs, is pruned until as many recurrent weights are
            left as in the one of normal width, in place of `sparsity`.
        inputs: of the layer, as a share of the task's.
        length: of the training, as a multiple of the run's steps.
        begins_dense: the training begins with the weights of the dense run of the same seed.
        rate: of learning, after a warm-up: "falling" straight down to 0 from then on; "held" until half of the steps,
            where masks become final; or "constant".
        rate_factor: by which the task's peak rate is multiplied.
        teaching: by the dense model of the same seed; None: nobody teaches.
        diagonal: the weights are block-diagonal from the start, in as many blocks as leave them the row's sparsity.
        schedule: "PolynomialDecay", "ThresholdRamp" or "OneShot".
        fractions: arguments of the schedule that are steps, as fractions of all steps; those of `for_training` without.
        arguments: further ones of the schedule; "quantile" of a ThresholdRamp is what q is in a dense model.
        pruner: arguments of the Pruner, "picks" or "block_size" in place of its pattern.
        gates: sparsity of each gate, in place of one for all.
        penalty: "l1" or "group_lasso", added to the loss until pruning has ended, times `strength`.
        weight_dtypes: in which converted models are stored.
        x: where a row about sensitivity is drawn.
    """

    name: str
    family: str
    sparsity: float | None = 0.9
    width: float | None = 1.0
    as_many_weights: bool = False
    inputs: float = 1.0
    length: int = 1
    begins_dense: bool = False
    rate: Rate = "held"
    rate_factor: float = 1.0
    teaching: Teaching | None = None
    diagonal: bool = False
    schedule: str = "PolynomialDecay"
    fractions: Mapping[str, float] = dataclasses.field(default_factory=dict)
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pruner: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    penalty: str | None = None
    strength: float = 0.0
    weight_dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    x: float = 0.0

    @property
    def is_dense(self) -> bool:
        return self.sparsity is None

    @property
    def is_tested(self) -> bool:
        """Whether it is measured on the test split: not where it is there to choose from."""
        return self.family in (CLAIMS, WIDTHS, OTHERS)

    @property
    def seeds(self) -> tuple[int, ...]:
        return SEEDS if self.family == CLAIMS else SEEDS[:1]

    def settings(self) -> dict[str, Any]:
        """What decides the outcome, for JSON."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for shown in ("name", "family", "weight_dtypes", "x"):
            del settings[shown]
        if self.teaching is not None:
            settings["teaching"] = dataclasses.asdict(self.teaching)
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in settings.items()}


PICKS = {"picks": [16, 32]}
BLOCK = {"block_size": [16, 1]}
SINGLE = {"block_size": [1, 1]}
TEACHING = Teaching(outputs=1.0, layers=1.0)
WITH_INT8 = (torch.float32, torch.int8)


def _blocks(block_rows: int, block_columns: int) -> Row:
    block = (block_rows, block_columns)
    return Row(f"90 % in {block_rows}x{block_columns} blocks", BLOCKS, pruner={"block_size": list(block)})


def _other(base: Row, name: str, **changes: Any) -> Row:
    return dataclasses.replace(base, name=name, family=OTHERS, **changes)


def _level(sparsity: float) -> Row:
    return _other(PRUNED, f"{100 * sparsity:g} % in picks", sparsity=sparsity)


def _wide(width: float, *, as_many_weights: bool) -> Row:
    how = "as many weights" if as_many_weights else "90 %"
    name = f"{width:g} times as wide, {how} in picks"
    return dataclasses.replace(PRUNED, name=name, family=WIDTHS, width=width, as_many_weights=as_many_weights)


def _ramp(quantile: float) -> Row:
    percent = f"q at {100 * quantile:g} %"
    arguments = {"quantile": quantile}
    return Row(f"ThresholdRamp, {percent}", SCHEDULES, schedule="ThresholdRamp", arguments=arguments, pruner=BLOCK)


DENSE = Row("dense", CLAIMS, None, rate="falling")
LONG = Row("dense, twice the steps", CLAIMS, None, length=2, rate="falling")
SMALL = Row("small dense", CLAIMS, None, None, rate="falling")
IN_BLOCKS = Row("90 % in 16x1 blocks", CLAIMS, pruner=BLOCK)
PRUNED = Row("90 % in picks", CLAIMS, pruner=PICKS, weight_dtypes=WITH_INT8)
IN_SINGLE = Row("90 % in single weights", CLAIMS, pruner=SINGLE)
SELF_TAUGHT = dataclasses.replace(
    PRUNED, name="trained, then 90 % in picks, taught by itself", begins_dense=True, teaching=TEACHING
)
WIDE = dataclasses.replace(_wide(1.5, as_many_weights=False), family=CLAIMS)
ONE_SHOT = _other(PRUNED, "90 % in picks at once", schedule="OneShot", fractions={"step": 0.275})
CLAIM_ROWS: tuple[Row, ...] = (DENSE, LONG, SMALL, IN_BLOCKS, PRUNED, IN_SINGLE, SELF_TAUGHT, WIDE)
WIDTH_ROWS: tuple[Row, ...] = (
    Row("dense, 2 times as wide", WIDTHS, None, 2.0, rate="falling"),
    _wide(1.5, as_many_weights=True),
    _wide(2.0, as_many_weights=True),
    _wide(2.0, as_many_weights=False),
)
OTHER_ROWS: tuple[Row, ...] = (
    _level(0.8),
    _level(0.95),
    _level(0.97),
    _other(SMALL, "small dense, taught by the dense model", teaching=Teaching(outputs=1.0)),
    _other(PRUNED, "90 % in picks, taught by the dense model", teaching=TEACHING),
    _other(PRUNED, "trained, then 90 % in picks", begins_dense=True),
    _other(PRUNED, "90 % in picks, twice the steps", length=2),
    _other(SELF_TAUGHT, "trained, then 90 % in 16x1 blocks, taught by itself", pruner=BLOCK),
    ONE_SHOT,
    _other(PRUNED, "block-diagonal", diagonal=True, pruner=SINGLE, weight_dtypes=(torch.float32,)),
)
RECIPE_ROWS: tuple[Row, ...] = tuple(
    dataclasses.replace(PRUNED, name=name, family=RECIPE, weight_dtypes=(torch.float32,), **changes)
    for name, changes in {
        "picks, rate falling from the start": {"rate": "falling"},
        "picks, rate constant": {"rate": "constant"},
        "picks, twice the peak rate": {"rate_factor": 2.0},
        "picks, one budget for the layer": {"pruner": PICKS | {"split": "layer"}},
        "picks, r and z 95 %, n 80 %": {"gates": {"r": 0.95, "z": 0.95, "n": 0.8}},
        "picks, half as many inputs, as many weights": {"inputs": 0.5, "as_many_weights": True},
        "picks, not balanced": {"pruner": PICKS | {"balanced": False}},
    }.items()
) + tuple(
    dataclasses.replace(
        SELF_TAUGHT, name=f"taught by itself, {name}", family=RECIPE, teaching=teaching, weight_dtypes=(torch.float32,)
    )
    for name, teaching in {
        "outputs only": Teaching(outputs=1.0),
        "layers only": Teaching(layers=1.0),
        "temperature 2": Teaching(outputs=1.0, temperature=2.0, layers=1.0),
    }.items()
)

RAMP = _ramp(0.95)
SHORT_ROWS: tuple[Row, ...] = (  # in 16x1 blocks, in trainings of a minute or two: what little a long one would change
    _blocks(8, 1),
    _blocks(16, 4),
    _blocks(16, 16),
    Row("score max", MASKS, pruner=BLOCK | {"score": "max"}),
    Row("tie_gates", MASKS, pruner=BLOCK | {"tie_gates": True}),
    Row("balanced", MASKS, pruner=BLOCK | {"balanced": True}),
    Row("weight_hh only, 90 %", MASKS, pruner=BLOCK | {"targets": {"*weight_ih*": None}}),
    _ramp(0.9),
    RAMP,
    Row(
        "L1, then hard pruning, 1x1", PENALTIES, schedule="OneShot", fractions={"step": 0.5},
        pruner=SINGLE, penalty="l1", strength=1e-5,
    ),
    Row("group lasso and gradual", PENALTIES, pruner=BLOCK, penalty="group_lasso", strength=3e-5),
)  # fmt: skip


def _varied(argument: str, values: Sequence[float], **others: Any) -> tuple[Row, ...]:
    """Rows in which one argument, a fraction of the steps, is varied."""
    family = SENSITIVITY + argument
    return tuple(
        Row(f"{argument} {100 * value:g} %", family, fractions={argument: value}, pruner=BLOCK, x=value, **others)
        for value in values
    )


VARIED: tuple[Row, ...] = (
    *_varied("begin_step", (0.0, 0.2, 0.35)),
    *_varied("end_step", (0.2, 0.35, 0.7, 0.9)),
    *_varied("frequency", (1 / 800, 0.00375, 0.1, 0.225)),
    *_varied("ramp_step", (0.1, 0.4), schedule="ThresholdRamp", arguments={"quantile": 0.95}),
    Row("power 1", SENSITIVITY + "power", pruner=BLOCK, arguments={"power": 1.0}, x=1.0),
)
LONG_ROWS: tuple[Row, ...] = (*CLAIM_ROWS, *WIDTH_ROWS, *OTHER_ROWS, *RECIPE_ROWS)
ROWS: tuple[Row, ...] = (*LONG_ROWS, *SHORT_ROWS, *VARIED)

SELECTIONS = {
    "claims": CLAIM_ROWS,
    "widths": WIDTH_ROWS,
    "others": OTHER_ROWS,
    "recipe": RECIPE_ROWS,
    "long": LONG_ROWS,
    "short": (IN_BLOCKS, *SHORT_ROWS),
    "sensitivity": (IN_BLOCKS, RAMP, *VARIED),
    "all": ROWS,
}
