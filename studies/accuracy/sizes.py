"""How wide a model is, and how far it is pruned, so that models of different width have as many parameters."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from studies.accuracy.rows import PRUNED, Row
from studies.tasks import Task
from triton_sparse_rnn import SparseGRU


class Size(NamedTuple):
    """Width of the recurrent layer, and the sparsity of its weights; None: dense."""

    hidden_size: int
    sparsity: float | None


class Parameters(NamedTuple):
    """How many a model has: weights of the recurrent layer, and all others, biases among them."""

    prunable: int
    others: int

    def left_at(self, sparsity: float) -> float:
        """How many are not zero at a sparsity."""
        return self.others + (1 - sparsity) * self.prunable


def size_of(task: Task, row: Row) -> Size:
    """Return what makes the row's model as large as the table says."""
    assert PRUNED.sparsity is not None
    normal = parameters(task)
    if row.width is None:
        budget, widths = normal.left_at(PRUNED.sparsity), range(1, task.hidden_size + 1)
        return Size(min(widths, key=lambda H: abs(parameters(task.resized(H)).left_at(0) - budget)), row.sparsity)
    hidden_size = round(row.width * task.hidden_size)
    if row.sparsity is None or not row.as_many_weights:
        return Size(hidden_size, row.sparsity)
    own = parameters(task.resized(hidden_size, row.inputs))
    return Size(hidden_size, 1 - (1 - row.sparsity) * normal.prunable / own.prunable)


def parameters(task: Task) -> Parameters:
    """Count the parameters of a task's model with a GRU."""
    with torch.device("meta"):
        model = task.build_model(SparseGRU, seed=0)
    prunable = sum(weight.numel() for weight in recurrent_weights(model))
    return Parameters(prunable, sum(parameter.numel() for parameter in model.parameters()) - prunable)


def recurrent_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of a model's recurrent layer, without biases."""
    rnn = model.rnn
    assert isinstance(rnn, nn.RNNBase)
    return [parameter for name, parameter in rnn.named_parameters() if name.startswith("weight")]
