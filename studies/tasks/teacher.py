"""A trained model that teaches another one: what it adds to a loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from triton_sparse_rnn.pruning import Distillation, divergence


class Teacher:
    """Add to a loss how far predictions and recurrent layers of a model are from those of a trained one.

    Args:
        model: that is taught.
        trained: where `layers` is not 0, with recurrent layers as wide as the model's.
        outputs: weight of the divergence of predictions; see `divergence`.
        temperature: of that divergence.
        layers: weight of the distance of the recurrent layers' outputs; see `Distillation`.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: nn.Module,
        *,
        outputs: float = 1.0,
        temperature: float = 1.0,
        layers: float = 0.0,
    ) -> None:
        self._outputs = outputs
        self._temperature = temperature
        self._compares_layers = layers > 0
        self._distillation = Distillation(model, trained, layers=None if layers else (), weight=layers)

    def __call__(self, *arguments: Any) -> Any:
        """Return what the trained model says; called after each call of the model."""
        return self._distillation.teacher(*arguments)

    def loss(self, scores: Tensor, taught: Tensor, steps: int = 1) -> Tensor:
        """Return what is added to the loss of a batch.

        Args:
            scores, taught: [..., classes], of the model and of the teacher.
            steps: how many predictions the loss of one example is a sum of.
        """
        total = self._outputs * steps * divergence(scores, taught, self._temperature)
        return total + self._distillation.loss() if self._compares_layers else total
