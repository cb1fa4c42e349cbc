"""Who else writes into weights that are pruned: small samples that should be zero, and changes without a step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from triton_sparse_rnn.pruning.targets import Weight
from triton_sparse_rnn.sparse.patterns import Pattern


class PrunedSamples:
    """A few pruned places of each weight, zero unless somebody wrote there since they were masked.

    On a CPU every look is answered at once, in some microseconds for a weight. Another device is not waited for: what
    was seen there gathers in a flag, which is read at every 64th look at the weight, or by `unread`.
    """

    PLACES: ClassVar = 64
    PERIOD: ClassVar = 64

    def __init__(self) -> None:
        self._places: dict[str, Tensor] = {}
        self._flags: dict[str, Tensor] = {}
        self._looks: dict[str, int] = {}

    def expect(self, weight: Weight, unit_mask: Tensor, bits: Tensor, pattern: Pattern) -> None:
        """Look from now on at a sample of what the pattern's mask, as `kept_bits`, has just made zero."""
        if weight.name not in self._places:
            every_gate = weight.every_gate(unit_mask)
            self._places[weight.name] = pattern.pruned_places(every_gate, weight.stacked(bits), self.PLACES)

    def forget(self, weight: Weight) -> None:
        """Do not look at a weight until it is masked again, since its mask is new or nobody applies it."""
        self._places.pop(weight.name, None)

    def unread(self) -> list[str]:
        """Return the names of the weights that were found not to be zero on another device, without a look."""
        return [name for name in list(self._flags) if self._flags.pop(name).item()]

    @torch.no_grad()
    def written(self, weights: Iterable[Weight], *, wait: bool = False) -> list[str]:
        """Return the names of the weights that were found not to be zero where they should be.

        Args:
            weights: to look at.
            wait: for other devices, too.
        """
        return [weight.name for weight in weights if weight.name in self._places and self._is_written(weight, wait)]

    def _is_written(self, weight: Weight, wait: bool) -> bool:
        parameter, places = weight.parameter, self._places[weight.name]
        if places.device != parameter.device:
            places = self._places[weight.name] = places.to(parameter.device)  # the model has moved
        found = torch.take(parameter.detach(), places).count_nonzero()
        if self._answers_at_once(parameter):
            return bool(found.item())
        if weight.name in self._flags:
            found += self._flags[weight.name].to(found.device)
        self._flags[weight.name] = found
        looks = self._looks[weight.name] = self._looks.get(weight.name, 0) + 1
        return (wait or looks % self.PERIOD == 0) and bool(self._flags.pop(weight.name).item())

    def _answers_at_once(self, parameter: Tensor) -> bool:
        return parameter.device.type == "cpu"


class StepWatch:
    """Finds out from backward passes that a weight is trained, though the attached optimizer never stepped."""

    PATIENCE: ClassVar = 12  # above that of Attachment, which knows who steps

    def __init__(self) -> None:
        self._seen: Tensor | None = None
        self._changes = 0

    def sees_training(self, parameter: Tensor) -> bool:
        """Take note of a backward pass; True at the one before which some values had changed often enough.

        Values, not versions: those count no writes by `.data`, and writes that change nothing.
        """
        values = parameter.detach().flatten()
        values = values[:: max(1, -(-len(values) // 4096))].clone().view(torch.uint8)  # bits: NaN is NaN
        changed = self._seen is not None and not torch.equal(values.to(self._seen.device), self._seen)
        self._seen = values
        self._changes += changed
        return changed and self._changes == self.PATIENCE
