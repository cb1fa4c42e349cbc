"""Who is timed. `prepare` does all that a user does once; what it returns runs the layer and returns y [T, B, H]."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from bench.workloads import Workload
from triton_sparse_rnn import PersistentGRU


class Contender(Protocol):
    """A name for the table, and how to get ready."""

    name: str

    def prepare(self, workload: Workload) -> tuple[nn.GRU, Callable[[], Tensor]]:
        """Return the layer whose result is expected and the call to be timed."""
        ...


class Dense:
    """PyTorch's own layer, which multiplies by the zeros too."""

    name = "nn.GRU"

    def prepare(self, workload: Workload) -> tuple[nn.GRU, Callable[[], Tensor]]:
        layer, x = workload.layer, workload.x
        return layer, lambda: layer(x)[0]


class Ours:
    """The converted layer on the numba kernels."""

    name = "PersistentGRU"

    def prepare(self, workload: Workload) -> tuple[nn.GRU, Callable[[], Tensor]]:
        return workload.layer, _converted(workload.layer, workload)


class OursWithoutZeros:
    """The same kernels on the layer before pruning: the part of a ratio that is not sparsity."""

    name = "PersistentGRU, 0 % zeros"

    def prepare(self, workload: Workload) -> tuple[nn.GRU, Callable[[], Tensor]]:
        return workload.dense_layer, _converted(workload.dense_layer, workload)


def _converted(layer: nn.GRU, workload: Workload) -> Callable[[], Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*little to skip")  # the layer without zeros is dense on purpose
        fast = PersistentGRU.from_dense(layer, block_size=workload.block_size, backend="cpu")
    x = workload.x
    if workload.T > 1:
        return lambda: fast(x)[0]
    x_t, h = x[0], torch.zeros(1, workload.B, workload.H)
    return lambda: fast.step(x_t, h)[0].unsqueeze(0)
