"""What the backward of one direction of a recurrent layer is given and gives, whichever backend runs it.

Forward is torch's own. Backward goes through time once; at every step it computes the gradients of the linear gates
(of what goes into sigmoid and tanh), makes the small ones exactly zero by a `Rule`, and goes on with what is left: to
the step before, to the input and to the weights (Zhu, Rhu, Clemons, Keckler, Xie 2017).

    LSTM, step t, of rows that run at t:
        dh    = grad_y[t] + carried dh
        dc    = carried dc + dh o (1 - tanh(c)^2)
        gates = (dc g i (1 - i),  dc c_before f (1 - f),  dc i (1 - g^2),  dh tanh(c) o (1 - o))
        gates = rule(gates)                            the only line that nn.LSTM does not have
        carried dc = dc f,  carried dh = gates W_hh
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal, NamedTuple, Protocol

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which gate gradients of a step become zero.

    They are judged in groups: by themselves ("elements"), or in blocks of `units` hidden units with all their gates in
    `rows` consecutive rows of a step ("blocks", the last of each axis may be smaller). The size v of a group is the
    absolute value of an element, or the root mean square of the block.

    Attributes:
        selection: "small" zeroes groups with v < threshold. "sample" keeps a group with v < threshold with
            probability v / threshold, multiplied by threshold / v, else zeroes it: the expected gradient stays as it
            was. A comparison with NaN is false, so NaN and infinity are always kept.
        group: "elements" or "blocks".
        units, rows: size of a block.
    """

    selection: Literal["small", "sample"] = "small"
    group: Literal["elements", "blocks"] = "elements"
    units: int = 16
    rows: int = 16


class Steps(NamedTuple):
    """The rows of a batch: those of step t are consecutive, as in PackedSequence.data.

    Attributes:
        batch_sizes: B_t of every step, never increasing.
        reverse: whether the direction goes from the last step to the first.
    """

    batch_sizes: tuple[int, ...]
    reverse: bool

    @property
    def is_ragged(self) -> bool:
        """Whether rows end before others."""
        return self.batch_sizes[0] != self.batch_sizes[-1]

    @property
    def starts(self) -> list[int]:
        """The first row of every step."""
        return [0, *itertools.accumulate(self.batch_sizes[:-1])]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """First row and number of rows of every step, in the order in which the direction takes the steps."""
        ranges = list(zip(self.starts, self.batch_sizes, strict=True))
        return ranges[::-1] if self.reverse else ranges


class BackwardDirection(NamedTuple):
    """One direction of a layer, with what its forward left. G gates in PyTorch's order; R = proj_size or H.

    All tensors have one dtype and device, and a last axis that is contiguous; other strides are free.
    """

    mode: Literal["LSTM", "GRU"]
    steps: Steps
    x: Tensor  # [N, I]
    y: Tensor  # [N, R]: h after every step
    h0: Tensor  # [B, R]
    c0: Tensor | None  # [B, H], of an LSTM
    weight_ih: Tensor  # [G H, I]
    weight_hh: Tensor  # [G H, R]
    bias_ih: Tensor | None  # [G H]
    bias_hh: Tensor | None
    weight_hr: Tensor | None  # [R, H], of an LSTM with proj_size
    workspace: Tensor | None  # what aten::mkldnn_rnn_layer left, if it ran the forward


class Arriving(NamedTuple):
    """Gradients that arrive at a direction."""

    y: Tensor  # [N, R]
    h: Tensor  # [B, R], of the final states
    c: Tensor | None  # [B, H], of an LSTM


class Needed(NamedTuple):
    """Which gradients are asked for; those of the states always are given."""

    x: bool
    weight_ih: bool
    weight_hh: bool
    bias: bool
    weight_hr: bool


class Gradients(NamedTuple):
    """What a direction gives back; None for what was not needed.

    `zeros` counts gate gradients that are exactly 0, those that were so by nature too. `gates` is given where
    `keep_gates` asked for it.
    """

    x: Tensor | None
    h0: Tensor
    c0: Tensor | None
    weight_ih: Tensor | None
    weight_hh: Tensor | None
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    weight_hr: Tensor | None
    zeros: Tensor  # [G], int64, on the device
    gates: Tensor | None  # [N, G, H], as used: zeros are in it


class Decision(NamedTuple):
    """What is to become zero in one backward of one direction.

    Attributes:
        rule: by which.
        thresholds: float32 on the device, [G] for elements, [1] for blocks; None: nothing becomes zero. The host does
            not read it. Nothing is below 0 or NaN.
        seed: [1], int64 on the device, from 0 to 2^32 - 1, of the random numbers (random.py).
        likely_zeros: the share of zeros to expect, 0 to 1, by which products that skip zeros are chosen; results do not
            depend on it but in rounding.
        keep_gates: whether to return the gate gradients themselves.
    """

    rule: Rule
    thresholds: Tensor | None
    seed: Tensor
    likely_zeros: float = 0.0
    keep_gates: bool = False


class BackwardBackend(Protocol):
    """What runs the backward of a direction: a module of backends/."""

    def unsupported_reason(self, direction: BackwardDirection, rule: Rule) -> str | None:
        """Why it cannot run this one, where it can run at all; None if it can. Numbers in tensors do not matter."""
        ...

    def direction_gradients(
        self, direction: BackwardDirection, arriving: Arriving, needed: Needed, decision: Decision
    ) -> Gradients:
        """Go back through time. There is at least one row; what arrives has the dtype of the direction."""
        ...


class Control(Protocol):
    """Who decides what becomes zero, and learns what did: the GateGradientController of a layer."""

    @property
    def backend(self) -> str | None:
        """One of BACKENDS, or None for the fastest that fits."""
        ...

    def begin(self, index: int, direction: BackwardDirection, arriving: Arriving) -> Decision:
        """Decide for direction number `index` of nn.RNNBase's order (layer * D + direction)."""
        ...

    def finish(
        self, index: int, direction: BackwardDirection, needed: Needed, decision: Decision, gradients: Gradients
    ) -> None:
        """Learn what came of it. Must not wait for the device."""
        ...
