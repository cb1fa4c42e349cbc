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
from triton_sparse_rnn.sparse.layer_config import GATES
from triton_sparse_rnn.sparse.patterns import Blocks, Pattern
from triton_sparse_rnn.sparse.picks import Picks

LAYERS = {
    "GRU": nn.GRU,
    "LSTM": nn.LSTM,
    "RNN_TANH": functools.partial(nn.RNN, nonlinearity="tanh"),
    "RNN_RELU": functools.partial(nn.RNN, nonlinearity="relu"),
}
PACKAGES = ("torch", "numba", "onnxruntime", "openvino")
_BLOCKS = Blocks(16, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A layer with input size H, both weights pruned at random in a pattern, over T steps of a batch of B."""

    cell: str = "GRU"
    H: int
    sparsity: float
    T: int = 100
    B: int = 1
    pattern: Pattern = _BLOCKS  # Blocks(1, 1) are single weights, pruned anywhere
    masks: str = "random"  # a key of MASKS
    dtype: torch.dtype = torch.float32  # of weights, x and y
    device: str = "cpu"  # where contenders run; layer and x stay on the CPU

    def __str__(self) -> str:
        zeros = f"{self.sparsity:.0%} zeros in {pattern_name(self.pattern)}"
        others = [self.masks] * (self.masks != "random") + [self.dtype_name] * (self.dtype != torch.float32)
        return ", ".join([f"{self.cell} H={self.H:4} T={self.T:3} B={self.B:2} {zeros}", *others])

    @property
    def layer(self) -> nn.RNNBase:
        """Weights are scaled so that states are as large as those of a dense layer."""
        return _layer(self.cell, self.H, self.sparsity, self.pattern, self.masks, self.dtype)

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

    def pruned_in(self, pattern: Pattern) -> Workload:
        """A layer of the same sizes and sparsity, pruned as a `Pruner` does by default in another pattern."""
        return dataclasses.replace(self, pattern=pattern, masks="balanced" if pattern.balanced else self.masks)

    @functools.cached_property
    def x(self) -> Tensor:
        """[T, B, H]."""
        return torch.randn(self.T, self.B, self.H, generator=torch.Generator().manual_seed(1)).to(self.dtype)

    def facts(self) -> dict[str, Any]:
        """Everything that belongs beside a time."""
        sizes = {"cell": self.cell, "T": self.T, "B": self.B, "I": self.H, "H": self.H}
        zeros = {"sparsity": self.sparsity, "pattern": repr(self.pattern), "masks": self.masks}
        if isinstance(self.pattern, Blocks):
            zeros["block_size"] = list(self.pattern.block_size)  # as in files of before there were other patterns
        machine = {"device": self.device, "processor": processor_name(), "threads": torch.get_num_threads()}
        if self.device != "cpu":
            machine |= gpu_facts()
        return sizes | zeros | {"dtype": self.dtype_name} | machine | _versions()


def pattern_name(pattern: Pattern) -> str:
    """As tables have it: "16x1", "picks 16x1 of 32"."""
    rows, columns = pattern.block_size
    return f"picks {rows}x{columns} of {pattern.bank}" if isinstance(pattern, Picks) else f"{rows}x{columns}"


def _random(pattern: Pattern, scores: Tensor, sparsity: float, *, balanced: bool = False) -> Tensor:
    """Exactly as many units in every gate; how many in a unit group, or in a bank of picks, is left to chance."""
    kept = torch.ones_like(scores[0], dtype=torch.bool)
    return torch.stack([pattern.prune_to_sparsity(gate, kept, sparsity, balanced=balanced) for gate in scores])


def _balanced(pattern: Pattern, scores: Tensor, sparsity: float) -> Tensor:
    """As many blocks in every unit group; of picks as many or one more, and so in each bank of one."""
    return _random(pattern, scores, sparsity, balanced=True)


def _tied(pattern: Pattern, scores: Tensor, sparsity: float) -> Tensor:
    """The same units in every gate."""
    return _random(pattern, scores[:1], sparsity).expand_as(scores)


MASKS = {"random": _random, "balanced": _balanced, "tied": _tied}  # of scores, as the pattern's masks, 0 to 1


@functools.lru_cache(maxsize=4)  # contenders of a workload come one after another; more layers than that fill memory
def _layer(cell: str, H: int, sparsity: float, pattern: Pattern, masks: str, dtype: torch.dtype) -> nn.RNNBase:
    generator = torch.Generator().manual_seed(0)
    layer = LAYERS[cell](H, H).eval().requires_grad_(False)
    for weight in map(layer.get_parameter, ("weight_ih_l0", "weight_hh_l0")):
        weight.uniform_(-1, 1, generator=generator)
        scores = torch.rand(pattern.mask_shape(GATES[cell], H, H), generator=generator)
        kept = MASKS[masks](pattern, scores, sparsity)
        # Picks keep the largest of a row of a bank: of other numbers, so that what is kept is as large as in blocks.
        others = torch.rand(GATES[cell], H, H, generator=generator)
        weight *= pattern.spread(kept, others).flatten(0, 1)
        weight /= (H * (1 - sparsity)) ** 0.5
    for bias in map(layer.get_parameter, ("bias_ih_l0", "bias_hh_l0")):
        bias.uniform_(-0.1, 0.1, generator=generator)
    return layer.to(dtype)


@functools.cache
def _versions() -> dict[str, str]:
    packages = {name: metadata.version(name) for name in PACKAGES if find_spec(name)}
    return packages | {"python": platform.python_version()}
