"""What is timed: a pruned GRU and a batch of sequences, with the exact result that a contender has to meet."""

from __future__ import annotations

import copy
import dataclasses
import functools
import platform
from typing import Any

import numba
import torch
from torch import Tensor, nn

from triton_sparse_rnn.doctor import processor_name
from triton_sparse_rnn.sparse.blocks import count_blocks, expand_block_mask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A GRU layer with input size H, both weights pruned at random in blocks, over T steps of a batch of B."""

    H: int
    sparsity: float
    T: int = 100
    B: int = 1
    block_size: tuple[int, int] = (16, 1)

    def __str__(self) -> str:
        rows, columns = self.block_size
        return f"GRU H={self.H:4} T={self.T:3} B={self.B:2} {self.sparsity:.0%} zeros in {rows}x{columns}"

    @functools.cached_property
    def layer(self) -> nn.GRU:
        """float32, weights scaled so that states are as large as those of a dense layer."""
        generator = torch.Generator().manual_seed(0)
        layer = nn.GRU(self.H, self.H).eval().requires_grad_(False)
        for weight in map(layer.get_parameter, ("weight_ih_l0", "weight_hh_l0")):
            weight.uniform_(-1, 1, generator=generator)
            grid = count_blocks(self.H, self.H, self.block_size)
            kept = torch.rand(3, *grid, generator=generator) >= self.sparsity
            weight *= expand_block_mask(kept, self.block_size, self.H, self.H).flatten(0, 1)
            weight /= (self.H * (1 - self.sparsity)) ** 0.5
        for bias in map(layer.get_parameter, ("bias_ih_l0", "bias_hh_l0")):
            bias.uniform_(-0.1, 0.1, generator=generator)
        return layer

    @functools.cached_property
    def dense_layer(self) -> nn.GRU:
        """The same layer before pruning: what the kernel gains without any zeros."""
        return dataclasses.replace(self, sparsity=0.0).layer

    @functools.cached_property
    def x(self) -> Tensor:
        """[T, B, H]."""
        return torch.randn(self.T, self.B, self.H, generator=torch.Generator().manual_seed(1))

    def facts(self) -> dict[str, Any]:
        """Everything that belongs beside a time."""
        zeros = {"sparsity": self.sparsity, "block_size": list(self.block_size)}
        versions = {"torch": torch.__version__, "numba": numba.__version__, "python": platform.python_version()}
        machine = {"device": "cpu", "processor": processor_name(), "threads": torch.get_num_threads()}
        sizes = {"cell": "GRU", "T": self.T, "B": self.B, "I": self.H, "H": self.H, "dtype": "float32"}
        return sizes | zeros | machine | versions


@functools.cache
def workload(H: int, sparsity: float, T: int = 100, B: int = 1) -> Workload:
    """Return one object for equal arguments, so that contenders share weights and inputs."""
    return Workload(H=H, sparsity=sparsity, T=T, B=B)


def assert_within_budget(y: Tensor, layer: nn.GRU, x: Tensor) -> None:
    """Fail unless y is as close to the float64 result as nn.GRU itself, within a factor of 4 and rounding."""
    exact = copy.deepcopy(layer).double()(x.double())[0]
    budget = 4 * (layer(x)[0] - exact).abs().max() + torch.finfo(torch.float32).eps
    error = (y - exact).abs().max()
    assert error <= budget, f"error {error:.2e} exceeds {budget:.2e}, so there is nothing to time"
