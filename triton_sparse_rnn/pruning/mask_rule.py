"""What an update makes of masks: the settings of a pruner, without its model, its steps and its masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from triton_sparse_rnn.notices import warn
from triton_sparse_rnn.pruning.budgets import least_kept, root_mean_square, scheduled, share_out
from triton_sparse_rnn.pruning.schedules import Schedule
from triton_sparse_rnn.pruning.targets import Weight, warn_of_emptied_gates
from triton_sparse_rnn.sparse.patterns import Pattern


@dataclasses.dataclass(frozen=True)
class MaskRule:
    """How masks are updated; attributes as for `Pruner`. A *part* is a gate of a weight, with tie_gates all of them."""

    pattern: Pattern
    score: str
    tie_gates: bool
    balanced: bool
    split: str

    def settings(self) -> dict[str, object]:
        """Plain values, which a checkpoint holds and compares."""
        return {**vars(self), "pattern": repr(self.pattern)}

    def check(self, weights: Sequence[Weight], *, balanced: bool) -> None:
        """Refuse schedules that do not go with the settings, and weights that are too small for the pattern.

        Args:
            weights: all that are pruned.
            balanced: whether it was asked for, not a default.

        Warns:
            UserWarning: of gates that will be pruned to nothing, or of layers that their floors keep from the schedule.
        """
        asked = ["balanced=True"] * balanced + ["split='layer'"] * (self.split == "layer")
        for weight in weights:
            if self.tie_gates and len(set(weight.schedules)) > 1:
                raise ValueError(f"tie_gates=True gives all gates one mask, but targets gives {weight.name} several")
            for schedule in weight.schedules:
                if asked and schedule is not None and schedule.sparsity_at(schedule.last_step) is None:
                    raise ValueError(
                        f"{asked[0]} needs a schedule by rank, PolynomialDecay or OneShot: a "
                        f"{type(schedule).__name__} (for {weight.name}) does not choose how many it prunes"
                    )
            where = f"each gate of {weight.name}" if weight.gates > 1 else weight.name
            self.pattern.check_size(*weight.matrix_shape, where)
        if self.split == "gate":
            warn_of_emptied_gates(weights, self.pattern, balanced=self.balanced)
            return
        for group in self.together(weights):
            for schedule, parts in self._budgets(group).items():
                self._warn_of_floors(group, schedule, parts)

    def together(self, weights: Sequence[Weight]) -> list[tuple[Weight, ...]]:
        """Group the weights that `update` takes at once: those of a layer and direction, or each on its own."""
        groups: dict[str, list[Weight]] = {}
        for weight in weights:
            groups.setdefault(weight.layer if self.split == "layer" else weight.name, []).append(weight)
        return [tuple(group) for group in groups.values()]

    def full_mask(self, weight: Weight) -> Tensor:
        """Return the pattern's mask of a weight before anything is pruned: all True, on the CPU."""
        return self.pattern.full_mask(1 if self.tie_gates else weight.gates, *weight.matrix_shape)

    def update(
        self, weights: Sequence[Weight], tensors: Sequence[Tensor], masks: Sequence[Tensor], step: int
    ) -> list[Tensor]:
        """Return what an update at `step` makes of masks, given the weights in `tensors`.

        Args:
            weights: a group of `together`; their schedules decide. Gates without an update at `step` keep their mask.
            tensors: of the shapes of the weights.
            masks: as `full_mask` has them, bool, True = kept, each on the device of its tensor.
            step: any.
        """
        updated, scores = [mask.clone() for mask in masks], {}
        for schedule, parts in self._budgets(weights).items():
            if not schedule.updates_at(step):
                continue
            for place in {place for place, _ in parts} - scores.keys():
                scores[place] = self._scores(weights[place], tensors[place])
            sparsity, threshold = schedule.sparsity_at(step), schedule.threshold_at(step)
            of_parts = [sparsity] * len(parts)
            if sparsity is not None and self.split == "layer":
                of_parts = self._share_out(weights, tensors, masks, scores, parts, sparsity)
            for (place, gate), share in zip(parts, of_parts, strict=True):
                part = scores[place][gate], masks[place][gate]
                if share is not None:
                    updated[place][gate] = self.pattern.prune_to_sparsity(*part, share, balanced=self.balanced)
                elif threshold is not None:
                    updated[place][gate] = self.pattern.prune_to_threshold(*part, threshold)
        return updated

    def _scores(self, weight: Weight, tensor: Tensor) -> Tensor:
        scores = self.pattern.scores(weight.stacked(tensor), self.score)
        return self.pattern.combine_gates(scores, self.score) if self.tie_gates else scores

    def _budgets(self, weights: Sequence[Weight]) -> dict[Schedule, list[tuple[int, int]]]:
        """By schedule, the parts that follow it: place among the weights, and gate."""
        budgets: dict[Schedule, list[tuple[int, int]]] = {}
        for place, weight in enumerate(weights):
            for gate, schedule in enumerate(weight.schedules[:1] if self.tie_gates else weight.schedules):
                if schedule is not None:
                    budgets.setdefault(schedule, []).append((place, gate))
        return budgets

    def _share_out(
        self,
        weights: Sequence[Weight],
        tensors: Sequence[Tensor],
        masks: Sequence[Tensor],
        scores: dict[int, Tensor],
        parts: list[tuple[int, int]],
        sparsity: float,
    ) -> list[float]:
        """The sparsities of parts whose units, relative to their own weights, are ranked together."""
        scales = {place: root_mean_square(tensors[place]) for place, _ in parts}
        scales = {place: scale.where(scale > 0, 1.0) for place, scale in scales.items()}
        shapes = [self._ranked_shape(weights[place]) for place, _ in parts]
        relative = [scores[place][gate].double() / scales[place] for place, gate in parts]
        return share_out(
            [each.reshape(shape) for each, shape in zip(relative, shapes, strict=True)],
            [masks[place][gate].reshape(shape) for (place, gate), shape in zip(parts, shapes, strict=True)],
            sparsity,
        )

    def _ranked_shape(self, weight: Weight) -> tuple[int, int]:
        """(rows, units) of a gate: of each row as many are pruned."""
        units = self.pattern.count_units(*weight.matrix_shape)
        in_row = self.pattern.count_units(*weight.matrix_shape, balanced=self.balanced)
        return units // max(1, in_row) or 1, in_row

    def _warn_of_floors(self, group: Sequence[Weight], schedule: Schedule, parts: list[tuple[int, int]]) -> None:
        sparsity = schedule.sparsity_at(schedule.last_step)
        if sparsity is None:
            return
        sizes = [self._ranked_shape(group[place])[1] for place, _ in parts]
        wanted, least = scheduled(sizes, sparsity), sum(least_kept(size, sparsity) for size in sizes)
        if wanted < least:
            names = ", ".join(group[place].name for place in sorted({place for place, _ in parts}))
            units = self._ranked_shape(group[0])[0] * (group[0].gates if self.tie_gates else 1)  # that go together
            warn(
                f"{names} will be less sparse than the schedule says, which would leave "
                f"{self.pattern.describe(wanted * units)}: {self.pattern.describe(least * units)} are kept, so that "
                "no gate loses all; take a finer pattern, or leave a weight dense by "
                f"targets={{{group[parts[0][0]].name!r}: None}}"
            )
