"""A look ahead: how sparse a pruner will make a model, and what it then stores and multiplies."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from triton_sparse_rnn.pruning.pruner import Pruner
from triton_sparse_rnn.pruning.scores import block_weight_counts
from triton_sparse_rnn.pruning.targets import Weight, find_weights
from triton_sparse_rnn.tables import align

_MOST_UPDATES = 100  # walked through on the way to the reference; more would not change the result by a point
_SAME_ORIGIN = 0.1  # cosine between the weights of model and reference; far above that of two seeds, about 1 / sqrt(n)
_RANDOM_SHARE = 0.5  # times (1 - cosine)^2; fitted on character models: H 128 to 512, 200 to 1000 steps, 50 to 90 %


@dataclasses.dataclass(frozen=True)
class WeightForecast:
    """What becomes of one weight.

    Attributes:
        name: as in `Pruner.masks`.
        weights: how many it has.
        zeros: how many of them are pruned.
        stored_blocks: blocks that are kept.
        nbytes: of a `BlockMatrix` of them in the dtype of the parameter, indices and filled up edges included.
        macs_per_step: multiply-accumulates for one input vector, filled up edges included.
        dense_nbytes: of the parameter as it is.
    """

    name: str
    weights: int
    zeros: int
    stored_blocks: int
    nbytes: int
    macs_per_step: int
    dense_nbytes: int

    @property
    def sparsity(self) -> float:
        """Pruned weights as a fraction of all."""
        return self.zeros / self.weights


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What `forecast` returns; print it as a table.

    Attributes:
        rows: one for each weight that the pruner prunes. The properties are their sums.
    """

    rows: tuple[WeightForecast, ...]

    @property
    def sparsity(self) -> float:
        """Pruned weights as a fraction of all in the rows."""
        return sum(row.zeros for row in self.rows) / sum(row.weights for row in self.rows)

    @property
    def stored_blocks(self) -> int:
        return sum(row.stored_blocks for row in self.rows)

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.rows)

    @property
    def dense_nbytes(self) -> int:
        return sum(row.dense_nbytes for row in self.rows)

    @property
    def macs_per_step(self) -> int:
        return sum(row.macs_per_step for row in self.rows)

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [("weight", "sparsity", "blocks", "bytes", "dense bytes", "MACs/step")]
        for name, row in [*((row.name, row) for row in self.rows), ("total", self)]:
            counts = (row.stored_blocks, row.nbytes, row.dense_nbytes, row.macs_per_step)
            table.append((name, f"{row.sparsity:.1%}", *(f"{count:,}" for count in counts)))
        return "\n".join(align(table, right=range(1, 6)))


@torch.no_grad()
def forecast(model: nn.Module, pruner: Pruner, reference: nn.Module | Mapping[str, Tensor] | None = None) -> Forecast:
    """Predict, before training, what the pruner will leave of a model. Nothing is changed.

    PolynomialDecay and OneShot choose how many blocks they prune, so these are known exactly (which ones is guessed
    from the reference; it matters only for the smaller blocks at an edge). ConstantMask is read off the model.

    What a ThresholdRamp prunes depends on where training takes the weights. If the reference was trained from the
    weights that `model` has now (the same seed), they are taken to get there by end_step on a random walk, and a block
    falls at the first update that finds its score at or under the threshold of that step: a weight that passes through
    zero on its way is caught, as in training, so more fall than end below q in the reference. If the two do not
    resemble each other (another seed, or so long a training that it forgot its start), or without a reference, those
    fall whose score in the reference is at most q.

    For single weights this was within 2.5 points on character models (GRU 128 to 512, 50 to 90 %). It is blind to one
    thing: weights that survive grow in the place of pruned ones, so blocks end less sparse, 16 x 1 by up to 5 points.

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
    >>> print(forecast(layer, Pruner(layer, schedule)))
    weight        sparsity  blocks   bytes  dense bytes  MACs/step
    weight_ih_l0     90.0%     153  10,504       98,304      2,448
    weight_hh_l0     90.0%     306  20,908      196,608      4,896
    total            90.0%     459  31,412      294,912      7,344
    """
    if not isinstance(pruner, Pruner):
        raise TypeError(f"pruner must be a Pruner, got {type(pruner).__name__}")
    starts = _weights_by_name("model", model, pruner)
    ends = starts if reference is None else _weights_by_name("reference", reference, pruner)
    return Forecast(tuple(_row(pruner, weight, starts[weight.name], ends[weight.name]) for weight in pruner.weights))


def _row(pruner: Pruner, weight: Weight, start: Tensor, end: Tensor) -> WeightForecast:
    every_gate = _predict_block_mask(pruner, weight, start, end).expand(weight.gates, -1, -1)
    BR, BC = pruner.block_size
    gates, block_rows, _ = weight.block_grid(pruner.block_size)
    stored = int(every_gate.sum())
    itemsize = weight.parameter.element_size()
    sizes = block_weight_counts(weight.matrix_shape, pruner.block_size, every_gate.device)
    return WeightForecast(
        name=weight.name,
        weights=weight.parameter.numel(),
        zeros=int((sizes * ~every_gate).sum()),
        stored_blocks=stored,
        nbytes=stored * (BR * BC * itemsize + 4) + 4 * (gates * block_rows + 1),  # values, columns, starts
        macs_per_step=stored * BR * BC,
        dense_nbytes=weight.parameter.numel() * itemsize,
    )


def _predict_block_mask(pruner: Pruner, weight: Weight, start: Tensor, end: Tensor) -> Tensor:
    """The mask after every update of the weight's schedules, while it goes from `start` to `end`."""
    mask = pruner.full_block_mask(weight).to(start.device)
    schedules = [schedule for schedule in weight.schedules if schedule is not None]
    arrival = max(schedule.last_step for schedule in schedules)
    updates = [step for step in range(arrival + 1) if any(schedule.updates_at(step) for schedule in schedules)]
    walked = {*updates[:: -(-len(updates) // _MOST_UPDATES)], *(schedule.last_step for schedule in schedules)}
    for step, tensor in _walk(start, end, sorted(walked)):
        mask = pruner.update_block_mask(weight, tensor, mask, step)
    return mask


def _walk(start: Tensor, end: Tensor, steps: list[int]) -> Iterator[tuple[int, Tensor]]:
    """Yield where a weight is at each step: a Brownian bridge that leaves `start` at 0 and is at `end` at the last."""
    if steps[0] == 0:
        yield 0, start
    cosine = torch.cosine_similarity(start.flatten().double(), end.flatten().double(), dim=0).item()
    now, before, arrival = start if cosine >= _SAME_ORIGIN else end, 0, steps[-1]
    # The less a trained weight resembles its start, the more of its movement is noise.
    variance = _RANDOM_SHARE * (1 - cosine) ** 2 * (end - now).square().nanmean()
    generator = torch.Generator(start.device).manual_seed(0)
    for step in filter(None, steps):
        done = (step - before) / (arrival - before)
        noise = torch.randn(now.shape, generator=generator, device=now.device, dtype=now.dtype)
        now = now.lerp(end, done) + noise * (variance * (step - before) / arrival * (1 - done)).sqrt()
        before = step
        yield step, now


def _weights_by_name(where: str, source: nn.Module | Mapping[str, Tensor], pruner: Pruner) -> dict[str, Tensor]:
    found = find_weights(where, source, pruner.weights)
    return {
        weight.name: found[weight.name].to(
            weight.parameter.device, torch.promote_types(weight.parameter.dtype, torch.float32)
        )
        for weight in pruner.weights
    }
