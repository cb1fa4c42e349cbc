"""The masks of all weights of a pruner: set at updates, applied to weights and to what belongs to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from triton_sparse_rnn.pruning.masks import kept_bits, zero_pruned
from triton_sparse_rnn.pruning.optimizers import state_tensors
from triton_sparse_rnn.pruning.scores import block_weight_counts
from triton_sparse_rnn.pruning.targets import Weight
from triton_sparse_rnn.pruning.watch import PrunedSamples


class WeightMasks:
    """A mask over blocks for each weight.

    Attributes:
        blocks: by name, [G, block rows, block columns], or [1, ...] for all gates alike; bool, True = kept.
        pruned_counts: by name, how many weights are pruned.
        samples: of pruned places, to look at.
    """

    def __init__(
        self, weights: tuple[Weight, ...], block_size: tuple[int, int], block_masks: dict[str, Tensor]
    ) -> None:
        self._weights = weights
        self._block_size = block_size
        self.blocks = block_masks
        self.pruned_counts = dict.fromkeys(block_masks, 0)
        self.samples = PrunedSamples()
        self._bits: dict[str, Tensor] = {}  # what `zero_pruned` takes, for each weight of which something is pruned

    def set(self, weight: Weight, block_mask: Tensor) -> None:
        """Take another mask; nothing is written to the weight."""
        parameter = weight.parameter
        self.samples.forget(weight)
        self.blocks[weight.name] = block_mask = block_mask.to(parameter.device)
        every_gate = block_mask.expand(weight.gates, -1, -1)
        counts = block_weight_counts(weight.matrix_shape, self._block_size, parameter.device)
        pruned = self.pruned_counts[weight.name] = int((counts * ~every_gate).sum())
        self._bits.pop(weight.name, None)
        if pruned:
            self._bits[weight.name] = kept_bits(every_gate, self._block_size, parameter.shape, parameter.dtype)

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
        bits = self._bits.get(weight.name)
        if bits is None:
            return
        if bits.device != weight.parameter.device:
            bits = self._bits[weight.name] = bits.to(weight.parameter.device)  # the model has moved
        zero_pruned(tensor, bits.to(tensor.device))

    def apply_everywhere(self, states: Iterable[Mapping[Any, Any]]) -> None:
        """Set it to zero in weights, gradients, and what optimizers remember of them in `states`."""
        for weight in self._weights:
            parameter = weight.parameter
            self.apply(weight, parameter)
            if weight.name in self._bits:
                self.samples.expect(weight, self.blocks[weight.name], self._block_size)
            if parameter.grad is not None:
                self.apply(weight, parameter.grad)
            for state in states:
                for tensor in state_tensors(state, parameter):
                    self.apply(weight, tensor)
