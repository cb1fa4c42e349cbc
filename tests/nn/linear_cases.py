"""What the tests of linear modules share: pruned layers, and each backend with what it runs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from triton_sparse_rnn import PersistentConv1d, PersistentLinear
from triton_sparse_rnn.kernels.triton.exchange import INTERPRETED

BACKENDS = ["reference", "cpu", *(["triton"] if INTERPRETED else [])]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
IN, OUT = 37, 21


def prune(layer: Any) -> None:
    """Make nine columns of ten zero, and of the others a third of the weights: little is left in any pattern."""
    weight = layer.weight.detach().flatten(1)
    weight[:, torch.arange(weight.shape[1]) % 10 != 3] = 0
    weight.masked_fill_(torch.rand(weight.shape) < 0.33, 0)


def make_linear(*, kind: type[Any] = nn.Linear, dtype: torch.dtype | None = None, **options: Any):
    """A pruned layer, seeded; an nn.Conv1d has kernel size 1."""
    torch.manual_seed(0)
    layer = kind(IN, OUT, *(() if kind is nn.Linear else (1,)), dtype=dtype, **options).eval()
    prune(layer)
    return layer


def convert(layer: nn.Module, backend: str | None = "cpu", **options: Any) -> Any:
    given: dict[str, Any] = {"backend": backend, "storage": (16, 1), **options}
    kind = PersistentConv1d if isinstance(layer, nn.Conv1d) else PersistentLinear
    return kind.from_dense(layer, **given)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Sums of a few dozen numbers around 1, each in an order of its own."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
