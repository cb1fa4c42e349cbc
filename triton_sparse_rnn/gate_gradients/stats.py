"""What zero gate gradients are worth: shares of zeros, and of the multiply-accumulates that they make redundant.

Of a direction with N rows (time steps times batch), G gates of H units, inputs of I and states of R numbers, a training
step multiplies, by scalars,

    forward   G H N (I + R)
    backward  G H N (I [dW_ih] + R [dW_hh] + I [dx] + R)         [x] = 1 if x is asked for, else 0

and, with proj_size, N H R (2 + [dW_hr]) for the projection. Every multiplication of backward's first line has one gate
gradient as a factor, so a zero makes I [dW_ih] + R [dW_hh] + I [dx] + R of them redundant: 2/3 of its share of the
whole, where everything is asked for.
"""

from __future__ import annotations

import dataclasses

from triton_sparse_rnn.gate_gradients.contract import BackwardDirection, Needed

ZerosOfGates = dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class GateGradientStats:
    """What a layer's `gate_gradient` did; plain numbers, read by `layer.gate_gradient_stats`.

    Directions have the names "l0", "l0_reverse", "l1" and so on, gates those of PyTorch ("i" "f" "g" "o" of an LSTM,
    "r" "z" "n" of a GRU). A gate gradient counts as zero if it is exactly 0; infinity and NaN never do. Only backward
    passes with a `gate_gradient` are counted, those of dense steps among them.

    Attributes:
        steps: backward passes so far, also those before a checkpoint that was loaded.
        zeros: {direction: {gate: share of zeros}} of the last backward, 0 to 1.
        mean_zeros: the same over all backward passes.
        redundant_macs: the share of multiply-accumulates of the last training step, all directions together, that have
            a zero gate gradient as a factor. The whole step counts: forward, and in backward what is asked for of dh,
            dx, and dW. Kernels skip some, all or none of them, as it pays.
        mean_redundant_macs: the same over all backward passes.
    """

    steps: int
    zeros: ZerosOfGates
    mean_zeros: ZerosOfGates
    redundant_macs: float
    mean_redundant_macs: float


def macs_of_training(direction: BackwardDirection, needed: Needed) -> int:
    """Return the multiply-accumulates of one training step of a direction."""
    N, I = direction.x.shape
    GH, R = direction.weight_hh.shape
    macs = GH * N * (I + R + macs_per_gate_gradient(direction, needed))
    if direction.weight_hr is not None:
        macs += N * direction.weight_hr.numel() * (2 + needed.weight_hr)
    return macs


def macs_per_gate_gradient(direction: BackwardDirection, needed: Needed) -> int:
    """Return how many multiply-accumulates have one and the same gate gradient as a factor."""
    I, R = direction.x.shape[1], direction.weight_hh.shape[1]
    return I * (needed.weight_ih + needed.x) + R * (needed.weight_hh + 1)
