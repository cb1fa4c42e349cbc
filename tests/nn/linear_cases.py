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


def prune(*layers: Any, zeros: float = 0.9) -> None:
    """Make weights zero here and there."""
    for layer in layers:
        with torch.no_grad():
            layer.weight.masked_fill_(torch.rand(layer.weight.shape) < zeros, 0)


def make_linear(*, kind: type[Any] = nn.Linear, zeros: float = 0.9, dtype: torch.dtype | None = None, **options: Any):
    """A pruned layer, seeded; an nn.Conv1d has kernel size 1."""
    torch.manual_seed(0)
    layer = kind(IN, OUT, *(() if kind is nn.Linear else (1,)), dtype=dtype, **options).eval()
    prune(layer, zeros=zeros)
    return layer


def convert(layer: nn.Module, backend: str | None = "cpu", **options: Any) -> Any:
    given: dict[str, Any] = {"backend": backend, "storage": (16, 1), **options}
    kind = PersistentConv1d if isinstance(layer, nn.Conv1d) else PersistentLinear
    return kind.from_dense(layer, **given)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Sums of a few dozen numbers around 1, each in an order of its own."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
