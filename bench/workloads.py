"""What is timed: a pruned recurrent layer and a batch of sequences."""

from __future__ import annotations

import dataclasses
import functools
import platform
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu.machine import gpu_facts
from triton_sparse_rnn.doctor import processor_name
from triton_sparse_rnn.sparse.blocks import count_blocks, expand_block_mask
from triton_sparse_rnn.sparse.layer_config import GATES

LAYERS = {
    "GRU": nn.GRU,
    "LSTM": nn.LSTM,
    "RNN_TANH": functools.partial(nn.RNN, nonlinearity="tanh"),
    "RNN_RELU": functools.partial(nn.RNN, nonlinearity="relu"),
}
PACKAGES = ("torch", "numba", "onnxruntime", "openvino")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A layer with input size H, both weights pruned at random in blocks, over T steps of a batch of B."""

    cell: str = "GRU"
    H: int
    sparsity: float
    T: int = 100
    B: int = 1
    block_size: tuple[int, int] = (16, 1)
    masks: str = "random"  # a key of MASKS
    dtype: torch.dtype = torch.float32  # of weights, x and y
    device: str = "cpu"  # where contenders run; layer and x stay on the CPU

    def __str__(self) -> str:
        rows, columns = self.block_size
        zeros = f"{self.sparsity:.0%} zeros in {rows}x{columns}"
        others = [self.masks] * (self.masks != "random") + [self.dtype_name] * (self.dtype != torch.float32)
        return ", ".join([f"{self.cell} H={self.H:4} T={self.T:3} B={self.B:2} {zeros}", *others])

    @property
    def layer(self) -> nn.RNNBase:
        """Weights are scaled so that states are as large as those of a dense layer."""
        return _layer(self.cell, self.H, self.sparsity, self.block_size, self.masks, self.dtype)

    @property
    def dtype_name(self) -> str:
        """Such as "float32"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def layer_name(self) -> str:
        """The name of the layer's class: GRU, LSTM or RNN."""
        return self.cell.partition("_")[0]

    @property
    def without_zeros(self) -> Workload:
        """The same layer before pruning: what a contender gains without any zeros."""
        return dataclasses.replace(self, sparsity=0.0)

    @functools.cached_property
    def x(self) -> Tensor:
        """[T, B, H]."""
        return torch.randn(self.T, self.B, self.H, generator=torch.Generator().manual_seed(1)).to(self.dtype)

    def facts(self) -> dict[str, Any]:
        """Everything that belongs beside a time."""
        sizes = {"cell": self.cell, "T": self.T, "B": self.B, "I": self.H, "H": self.H}
        zeros = {"sparsity": self.sparsity, "block_size": list(self.block_size), "masks": self.masks}
        machine = {"device": self.device, "processor": processor_name(), "threads": torch.get_num_threads()}
        if self.device != "cpu":
            machine |= gpu_facts()
        return sizes | zeros | {"dtype": self.dtype_name} | machine | _versions()


def _random(scores: Tensor, sparsity: float) -> Tensor:
    return scores >= sparsity


def _balanced(scores: Tensor, sparsity: float) -> Tensor:
    """As many blocks in every unit group and gate."""
    return scores.argsort(dim=2) >= round(sparsity * scores.shape[2])


def _tied(scores: Tensor, sparsity: float) -> Tensor:
    """The same blocks in every gate."""
    return _random(scores[:1], sparsity).expand_as(scores)


MASKS = {"random": _random, "balanced": _balanced, "tied": _tied}  # of scores [G, block rows, block columns], 0 to 1


@functools.lru_cache(maxsize=4)  # contenders of a workload come one after another; more layers than that fill memory
def _layer(
    cell: str, H: int, sparsity: float, block_size: tuple[int, int], masks: str, dtype: torch.dtype
) -> nn.RNNBase:
    generator = torch.Generator().manual_seed(0)
    layer = LAYERS[cell](H, H).eval().requires_grad_(False)
    for weight in map(layer.get_parameter, ("weight_ih_l0", "weight_hh_l0")):
        weight.uniform_(-1, 1, generator=generator)
        grid = count_blocks(H, H, block_size)
        kept = MASKS[masks](torch.rand(GATES[cell], *grid, generator=generator), sparsity)
        weight *= expand_block_mask(kept, block_size, H, H).flatten(0, 1)
        weight /= (H * (1 - sparsity)) ** 0.5
    for bias in map(layer.get_parameter, ("bias_ih_l0", "bias_hh_l0")):
        bias.uniform_(-0.1, 0.1, generator=generator)
    return layer.to(dtype)


@functools.cache
def _versions() -> dict[str, str]:
    packages = {name: metadata.version(name) for name in PACKAGES if find_spec(name)}
    return packages | {"python": platform.python_version()}
