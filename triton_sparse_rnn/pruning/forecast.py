"""A look ahead: how sparse a pruner will make a model, and what it then stores and multiplies."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from triton_sparse_rnn.pruning.pruner import Pruner
from triton_sparse_rnn.pruning.targets import Weight, find_weights
from triton_sparse_rnn.sparse.patterns import Pattern
from triton_sparse_rnn.tables import align


@dataclasses.dataclass(frozen=True)
class WeightForecast:
    """What becomes of one weight.

    Attributes:
        name: as in `Pruner.masks`.
        weights: how many it has.
        zeros: how many of them are pruned.
        stored_units: how many units of the pattern, blocks or picked units, are kept.
        nbytes: of a `BlockMatrix` of them in the dtype of the parameter, indices and filled up edges included.
        macs_per_step: multiply-accumulates for one input vector, filled up edges included.
        dense_nbytes: of the parameter as it is.
    """

    name: str
    weights: int
    zeros: int
    stored_units: int
    nbytes: int
    macs_per_step: int
    dense_nbytes: int

    @property
    def sparsity(self) -> float:
        """Pruned weights as a fraction of all."""
        return self.zeros / self.weights


@dataclasses.dataclass(frozen=True)
class Forecast(WeightForecast):
    """What `forecast` returns, all weights together; print it as a table.

    Attributes:
        rows: one for each weight that the pruner prunes.
        pattern: the pruner's.
    """

    rows: tuple[WeightForecast, ...]
    pattern: Pattern

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [("weight", "sparsity", "stored", "bytes", "dense bytes", "MACs/step")]
        for row in (*self.rows, self):
            counts = (row.nbytes, row.dense_nbytes, row.macs_per_step)
            stored = self.pattern.describe(row.stored_units)
            table.append((row.name, f"{row.sparsity:.1%}", stored, *(f"{count:,}" for count in counts)))
        return "\n".join(align(table, right=range(1, 6)))


@torch.no_grad()
def forecast(model: nn.Module, pruner: Pruner, reference: nn.Module | Mapping[str, Tensor] | None = None) -> Forecast:
    """Predict, before training, what the pruner will leave of a model. Nothing is changed.

    PolynomialDecay and OneShot choose how many units they prune, so these are known exactly (which ones is guessed
    from the reference; it matters only for the smaller ones at an edge), with split="layer" those of a layer as a
    whole: how its weights and gates share them is guessed too. ConstantMask is read off the model.

    What a ThresholdRamp prunes depends on where training takes the weights; those are taken to fall whose score in the
    reference is at most q. Blocks end less sparse, 16 x 1 by 2 to 11 points, since what survives grows in the place of
    what fell. Single weights are also caught on their way through zero: at q for 50, 70 and 90 % of them it became 60,
    75 and 90 (docs/results.md).

    Args:
        model: about to be trained, with the weights it starts from.
        pruner: made for it, or for one with the same parameters; its progress so far is not looked at.
        reference: a dense model trained as this one will be, or its state_dict; None takes `model` itself.

    Raises:
        TypeError: an argument is not of its type.
        ValueError: model or reference lacks a weight of the pruner, or has it in another shape.

    >>> from triton_sparse_rnn.pruning import PolynomialDecay
    >>> layer = nn.GRU(64, 128)
    >>> schedule = PolynomialDecay(final_sparsity=0.9, begin_step=0, end_step=1000)
    >>> print(forecast(layer, Pruner(layer, schedule, pattern=(16, 1))))
    weight        sparsity              stored   bytes  dense bytes  MACs/step
    weight_ih_l0     90.0%  153 blocks of 16x1  10,504       98,304      2,448
    weight_hh_l0     90.0%  306 blocks of 16x1  20,908      196,608      4,896
    total            90.0%  459 blocks of 16x1  31,412      294,912      7,344
    """
    if not isinstance(pruner, Pruner):
        raise TypeError(f"pruner must be a Pruner, got {type(pruner).__name__}")
    starts = _weights_by_name("model", model, pruner)
    ends = starts if reference is None else _weights_by_name("reference", reference, pruner)
    masks = _final_masks(pruner, starts, ends)
    rows = tuple(_row(pruner, weight, masks[weight.name]) for weight in pruner.weights)
    counts = (field.name for field in dataclasses.fields(WeightForecast) if field.name != "name")
    return Forecast(
        "total",
        **{count: sum(getattr(row, count) for row in rows) for count in counts},
        rows=rows,
        pattern=pruner.pattern,
    )


def _final_masks(pruner: Pruner, starts: dict[str, Tensor], ends: dict[str, Tensor]) -> dict[str, Tensor]:
    """By name, the masks of units after the last updates."""
    masks: dict[str, Tensor] = {}
    for group in pruner.rule.together(pruner.weights):
        found = [pruner.rule.full_mask(weight).to(starts[weight.name].device) for weight in group]
        schedules = {schedule for weight in group for schedule in weight.schedules if schedule is not None}
        for step in sorted({schedule.last_step for schedule in schedules}):
            tensors = [(ends if step else starts)[weight.name] for weight in group]
            found = pruner.rule.update(group, tensors, found, step)
        masks |= zip((weight.name for weight in group), found, strict=True)
    return masks


def _row(pruner: Pruner, weight: Weight, mask: Tensor) -> WeightForecast:
    every_gate = weight.every_gate(mask)
    stored, itemsize = int(every_gate.sum()), weight.parameter.element_size()
    return WeightForecast(
        name=weight.name,
        weights=weight.parameter.numel(),
        zeros=pruner.pattern.pruned_weights(every_gate, *weight.matrix_shape),
        stored_units=stored,
        nbytes=pruner.pattern.stored_bytes(stored, weight.gates, *weight.matrix_shape, itemsize),
        macs_per_step=stored * pruner.pattern.products,
        dense_nbytes=weight.parameter.numel() * itemsize,
    )


def _weights_by_name(where: str, source: nn.Module | Mapping[str, Tensor], pruner: Pruner) -> dict[str, Tensor]:
    found = find_weights(where, source, pruner.weights)
    return {
        weight.name: found[weight.name].to(
            weight.parameter.device, torch.promote_types(weight.parameter.dtype, torch.float32)
        )
        for weight in pruner.weights
    }
