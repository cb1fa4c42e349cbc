"""The masks of all weights of a pruner: set at updates, applied to weights and to what belongs to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from triton_sparse_rnn.pruning.masks import kept_bits, zero_pruned
from triton_sparse_rnn.pruning.optimizers import state_tensors
from triton_sparse_rnn.pruning.targets import Weight
from triton_sparse_rnn.pruning.watch import PrunedSamples
from triton_sparse_rnn.sparse.patterns import Pattern


class WeightMasks:
    """A mask of each weight, as its pattern has it.

    Attributes:
        of_units: by name, the pattern's masks, of each gate or of all alike; bool, True = kept.
        pruned_counts: by name, how many weights are pruned.
        samples: of pruned places, to look at.
    """

    def __init__(self, weights: tuple[Weight, ...], pattern: Pattern, unit_masks: dict[str, Tensor]) -> None:
        self._weights = weights
        self._pattern = pattern
        self.of_units = unit_masks
        self.pruned_counts = dict.fromkeys(unit_masks, 0)
        self.samples = PrunedSamples()
        self._bits: dict[str, Tensor] = {}  # what `zero_pruned` takes, for each weight of which something is pruned

    def set(self, weight: Weight, unit_mask: Tensor) -> None:
        """Take a mask that prunes more, spread over the weight as it is; nothing is written to it."""
        bits = self._bits_of(weight)
        self._take(weight, unit_mask, weight.parameter.detach(), None if bits is None else bits.ne(0))

    def load(self, weight: Weight, unit_mask: Tensor, kept: Tensor | None) -> None:
        """Take any mask, in place of the one there is; nothing is written to the weight.

        Args:
            weight: whose mask.
            unit_mask: as the pattern has it.
            kept: the same over the weight, where `untold` had to say it.
        """
        self._take(weight, unit_mask, weight.parameter.detach() if kept is None else kept, None)

    def untold(self, weight: Weight) -> Tensor | None:
        """The mask over the weight, if a mask of units and the weight as it is do not tell it.

        Where the pattern keeps the largest weights, those that are kept and yet zero look like pruned ones.
        """
        bits = self._bits_of(weight) if self._pattern.follows_weights else None
        kept = None if bits is None else bits.ne(0)
        return None if kept is None or torch.equal(kept, weight.parameter.detach().ne(0)) else kept

    def spread(self, weight: Weight) -> Tensor:
        """A mask of the weight's shape and device: bool, True = kept."""
        if weight.name in self._bits:
            return self._bits[weight.name].ne(0)
        return torch.ones_like(weight.parameter, dtype=torch.bool)

    def apply(self, weight: Weight, tensor: Tensor) -> None:
        """Set what is pruned of the weight to zero in a tensor of its shape: itself, a gradient, momentum, a copy.

        Raises:
            TypeError: a sparse tensor.
        """
        if tensor.layout != torch.strided:
            raise TypeError(
                f"{weight.name} must have dense gradients and optimizer state, got {tensor.layout}: "
                "give its nn.Embedding sparse=False, or leave it out of include"
            )
        if (bits := self._bits_of(weight)) is not None:
            zero_pruned(tensor, bits.to(tensor.device))

    def apply_everywhere(self, states: Iterable[Mapping[Any, Any]]) -> None:
        """Set it to zero in weights, gradients, and what optimizers remember of them in `states`."""
        for weight in self._weights:
            parameter = weight.parameter
            self.apply(weight, parameter)
            if weight.name in self._bits:
                self.samples.expect(weight, self.of_units[weight.name], self._bits[weight.name], self._pattern)
            if parameter.grad is not None:
                self.apply(weight, parameter.grad)
            for state in states:
                for tensor in state_tensors(state, parameter):
                    self.apply(weight, tensor)

    def _take(self, weight: Weight, unit_mask: Tensor, source: Tensor, before: Tensor | None) -> None:
        parameter = weight.parameter
        self.samples.forget(weight)
        self.of_units[weight.name] = unit_mask = unit_mask.to(parameter.device)
        every_gate = weight.every_gate(unit_mask)
        pruned = self.pruned_counts[weight.name] = self._pattern.pruned_weights(every_gate, *weight.matrix_shape)
        self._bits.pop(weight.name, None)
        if pruned:
            before = None if before is None else weight.stacked(before)
            mask = self._pattern.spread(every_gate, weight.stacked(source.to(parameter.device)), before)
            self._bits[weight.name] = kept_bits(mask.view(parameter.shape), parameter.dtype)

    def _bits_of(self, weight: Weight) -> Tensor | None:
        bits = self._bits.get(weight.name)
        if bits is not None and bits.device != weight.parameter.device:
            bits = self._bits[weight.name] = bits.to(weight.parameter.device)  # the model has moved
        return bits
