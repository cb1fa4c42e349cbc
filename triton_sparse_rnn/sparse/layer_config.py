"""A recurrent layer without its numbers: kind, sizes and options, and the weights that follow from them."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, TypeVar

from torch import nn

GATE_NAMES = {"RNN_TANH": "h", "RNN_RELU": "h", "GRU": "rzn", "LSTM": "ifgo"}  # by nn.RNNBase.mode, a letter each
GATES = {mode: len(names) for mode, names in GATE_NAMES.items()}  # G
LayerT = TypeVar("LayerT", bound=nn.RNNBase)


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """What nn.RNNBase has under these names, as plain numbers of Python; numpy's become such.

    Raises:
        TypeError, ValueError: no nn.RNN, nn.GRU or nn.LSTM has such a value.

    >>> config = LayerConfig.of(nn.LSTM(4, 8, num_layers=2, proj_size=3, bidirectional=True))
    >>> config.gates, config.directions, config.state_sizes
    (4, 2, (3, 8))
    >>> config.weight_shape("weight_ih_l1_reverse")
    (32, 6)
    """

    mode: str
    input_size: int
    hidden_size: int
    proj_size: int = 0
    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    bidirectional: bool = False

    def __post_init__(self) -> None:
        if self.mode not in GATE_NAMES:
            raise ValueError(f"mode must be one of {', '.join(GATE_NAMES)}, got {self.mode!r}")
        for name, least in {"input_size": 0, "hidden_size": 1, "proj_size": 0, "num_layers": 1}.items():
            size = operator.index(getattr(self, name))
            if size < least:
                raise ValueError(f"{name} must be at least {least}, got {size}")
            object.__setattr__(self, name, size)
        for name in ("bias", "batch_first", "bidirectional"):
            object.__setattr__(self, name, bool(getattr(self, name)))
        object.__setattr__(self, "dropout", float(self.dropout))

    @classmethod
    def of(cls, layer: nn.Module) -> LayerConfig:
        """Return that of an nn.RNN, nn.GRU or nn.LSTM, or of a persistent module."""
        return cls(**{field.name: getattr(layer, field.name) for field in dataclasses.fields(cls)})

    @property
    def gate_names(self) -> str:
        """One letter for each gate, in the order in which they are stacked: "rzn", "ifgo" or "h"."""
        return GATE_NAMES[self.mode]

    @property
    def gates(self) -> int:
        """G."""
        return len(self.gate_names)

    @property
    def directions(self) -> int:
        """D."""
        return 2 if self.bidirectional else 1

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """The last axis of h and, for an LSTM, of c."""
        hidden = self.proj_size or self.hidden_size
        return (hidden, self.hidden_size) if self.mode == "LSTM" else (hidden,)

    def weight_names(self, layer: int | None = None) -> list[str]:
        """Return the names of all weights, or of one layer's, in the order of nn.RNNBase.

        >>> LayerConfig("GRU", 4, 8, bias=False, bidirectional=True).weight_names()
        ['weight_ih_l0', 'weight_hh_l0', 'weight_ih_l0_reverse', 'weight_hh_l0_reverse']
        """
        kinds = ["weight_ih", "weight_hh"]
        kinds += ["bias_ih", "bias_hh"] if self.bias else []
        kinds += ["weight_hr"] if self.proj_size else []
        layers = range(self.num_layers) if layer is None else (layer,)
        ends = ("", "_reverse")[: self.directions]
        return [f"{kind}_l{k}{end}" for k in layers for end in ends for kind in kinds]

    def weight_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one of `weight_names()`."""
        rows, hidden = self.gates * self.hidden_size, self.state_sizes[0]
        if name.startswith("bias"):
            return (rows,)
        if name.startswith("weight_hr"):
            return hidden, self.hidden_size
        if name.startswith("weight_hh"):
            return rows, hidden
        is_first = name.removesuffix("_reverse") == "weight_ih_l0"
        return rows, self.input_size if is_first else hidden * self.directions

    def gate_count(self, name: str) -> int:
        """Return how many matrices a weight stacks: G, and 1 for weight_hr."""
        return 1 if name.startswith("weight_hr") else self.gates

    def sizes(self) -> dict[str, Any]:
        """Return what tells the weights, by name: all but `batch_first` and `dropout`."""
        held = dataclasses.asdict(self)
        return {name: value for name, value in held.items() if name not in ("batch_first", "dropout")}

    def build(self, layer_class: type[LayerT], **factory: Any) -> LayerT:
        """Make a layer of `layer_class`, which takes the arguments of nn.RNN, nn.GRU or nn.LSTM.

        Args:
            layer_class: of this mode, torch.nn's or derived from it.
            factory: device and dtype.
        """
        options: dict[str, Any] = {"proj_size": self.proj_size} if self.proj_size else {}
        if self.mode.startswith("RNN_"):
            options["nonlinearity"] = self.mode.removeprefix("RNN_").lower()
        options |= {name: getattr(self, name) for name in ("num_layers", "bias", "batch_first", "bidirectional")}
        new_class: Any = layer_class  # nn.RNNBase itself would take a mode
        layer = new_class(self.input_size, self.hidden_size, **options, **factory)
        layer.dropout = self.dropout  # the constructor would warn of it in a single layer, which the user has heard
        return layer

    def shown(self) -> list[str]:
        """Return sizes and options as the repr of nn.RNNBase shows them."""
        options = dataclasses.fields(self)[3:]
        changed = [option.name for option in options if getattr(self, option.name) != option.default]
        return [str(self.input_size), str(self.hidden_size), *(f"{name}={getattr(self, name)}" for name in changed)]
