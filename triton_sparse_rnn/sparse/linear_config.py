"""A linear layer without its numbers, and what it shares with a recurrent one: weights of some names and sizes."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, TypeAlias

from torch import nn

from triton_sparse_rnn.sparse.layer_config import LayerConfig

Config: TypeAlias = "LayerConfig | LinearConfig"


@dataclasses.dataclass(frozen=True)
class LinearConfig:
    """What nn.Linear has under these names, and an nn.Conv1d of kernel size 1 as its channels.

    Raises:
        TypeError, ValueError: no nn.Linear has such a value.

    >>> LinearConfig.of(nn.Conv1d(4, 8, 1, bias=False))
    LinearConfig(in_features=4, out_features=8, bias=False)
    >>> LinearConfig.of(nn.Linear(4, 8)).weight_names()
    ['weight', 'bias']
    """

    in_features: int
    out_features: int
    bias: bool = True

    def __post_init__(self) -> None:
        for name in ("in_features", "out_features"):
            size = operator.index(getattr(self, name))
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
            object.__setattr__(self, name, size)
        object.__setattr__(self, "bias", bool(self.bias))

    @classmethod
    def of(cls, layer: nn.Module) -> LinearConfig:
        """Return that of an nn.Linear or nn.Conv1d, or of a module that either was converted to."""
        names = ("in_channels", "out_channels") if hasattr(layer, "in_channels") else ("in_features", "out_features")
        sizes = (getattr(layer, name) for name in names)
        return cls(*sizes, bias=layer.bias is not None)

    def weight_names(self) -> list[str]:
        """Return the names of all weights, in the order of nn.Linear."""
        return ["weight", "bias"] if self.bias else ["weight"]

    def weight_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one of `weight_names()`; of the weight it is that of nn.Linear."""
        return (self.out_features,) if name == "bias" else (self.out_features, self.in_features)

    def gate_count(self, name: str) -> int:
        """Return how many matrices a weight stacks: 1."""
        return 1

    def sizes(self) -> dict[str, Any]:
        """Return what tells the weights, by name."""
        return dataclasses.asdict(self)

    def build(self, layer_class: Any, **factory: Any) -> Any:
        """Make a layer of nn.Linear, of nn.Conv1d, or of a class with the arguments of one.

        Args:
            layer_class: the class.
            factory: device and dtype.
        """
        sizes = (self.in_features, self.out_features)
        kernel_size = (1,) if issubclass(layer_class, nn.Conv1d) else ()
        return layer_class(*sizes, *kernel_size, bias=self.bias, **factory)


def config_of(layer: nn.Module) -> Config:
    """Return what a recurrent or linear layer, dense or converted, has of sizes and options."""
    held = getattr(layer, "_config", None)
    if isinstance(held, (LayerConfig, LinearConfig)):
        return held
    return LayerConfig.of(layer) if isinstance(layer, nn.RNNBase) else LinearConfig.of(layer)
