"""Which storage of a weight is the fastest: an estimate of time, made here and nowhere else.

At batch 1 a product takes the time of the vectors that are stored, 16 weights each:

    estimate = stored vectors * VECTOR_TIMES[vectors of the processor][activations][pattern][of W_hh or W_ih]

and an ordinary matrix, multiplied by torch, that of all its vectors times DENSE_VECTOR_TIME. Patterns are compared by
what they would store of this weight, zeros that fill them up included.

A linear layer meets one row at a time and many at once, and is to be slower than torch in neither case: what counts is
the larger of the two estimates, each as a share of torch's.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from triton_sparse_rnn.kernels.cpu import support
from triton_sparse_rnn.sparse.patterns import Blocks, Pattern
from triton_sparse_rnn.sparse.picks import Picks

# Relative to a vector of Blocks(16, 1) in float32 on the same processor: first of W_hh h, then of W_ih x, in which 8
# steps share each load of a weight. By `python -m bench.cpu.patterns vectors`, GRU of H = 512 at 90 % zeros, AMD Zen 4,
# which ran code for older processors for the other rows.
_Times: TypeAlias = "dict[Pattern, tuple[float, float]]"
_FLOATS: _Times = {
    Blocks(16, 1): (1, 1),
    Blocks(16, 4): (1, 0.94),
    Blocks(16, 16): (1, 0.87),
    Blocks(16, 32): (1, 0.94),
}
_NARROW: _Times = {
    Blocks(16, 1): (1, 1),
    Blocks(16, 4): (0.9, 0.9),
    Blocks(16, 16): (0.9, 0.75),
    Blocks(16, 32): (0.85, 0.8),
}
_BYTES: _Times = {Blocks(16, 1): (0.79, 0.68), Blocks(16, 4): (0.5, 0.17), Blocks(16, 16): (0.57, 0.19)}
_NO_BYTES: _Times = {Blocks(16, 1): (1.2, 2.2), Blocks(16, 4): (1.15, 2.1), Blocks(16, 16): (1.2, 2.1)}
VECTOR_TIMES: dict[str, dict[torch.dtype | None, _Times]] = {
    "AVX-512 with bytes": {
        None: _FLOATS | {Picks(16, 32): (1.2, 2.1)},
        torch.int8: _BYTES | {Picks(16, 64, 4): (0.73, 0.6), Picks(16, 32): (1.7, 3.2)},
    },
    "AVX-512": {
        None: _FLOATS | {Picks(16, 32): (1.2, 2.0)},
        torch.int8: _NO_BYTES | {Picks(16, 32): (1.65, 2.95)},
    },
    "AVX2": {
        None: _NARROW | {Picks(16, 8): (1.3, 1.9), Picks(16, 32): (3, 8.6)},
        torch.int8: _NO_BYTES | {Picks(16, 8): (1.5, 2.75), Picks(16, 32): (3.4, 9.3)},
    },
    "generic": {
        None: _NARROW | {Picks(16, 32): (2.6, 4.7)},
        torch.int8: _NO_BYTES | {Picks(16, 32): (4.35, 7.3)},
    },
}
# On a GPU, by the loads of h or x that a vector takes (python -m tools.estimate), one of blocks and four of picks: an
# estimate, not measured. All blocks run there as those of 16 x 1.
GPU_VECTOR_TIMES: _Times = {Blocks(16, 1): (1, 1), Picks(16, 32): (1.5, 4)}
# Of W_ih x, by torch. On one thread it was 1.45, but torch may have more, and what is not pruned at all is left to it.
DENSE_VECTOR_TIME = 0.7
# Of one row, by torch: the vectors are in a row in memory, and those of a block are not. Not measured as carefully.
DENSE_ROW_VECTOR_TIME = 0.8


def fastest_storage(
    weight: Tensor, *, of_inputs: bool, backend: str | None, activation_dtype: torch.dtype | None, may_stay_dense: bool
) -> Pattern | None:
    """Return the pattern in which a weight is multiplied fastest, or None for an ordinary matrix.

    Args:
        weight: [G, H, C].
        of_inputs: whether it is a weight_ih.
        backend: that is to run it, as for `PersistentGRU.from_dense`.
        activation_dtype: torch.int8 for quantised activations.
        may_stay_dense: whether None is allowed.
    """
    gates, rows, columns = weight.shape
    times = _vector_times(weight.device, backend)[activation_dtype]
    estimates: dict[Pattern | None, float] = {
        pattern: time[of_inputs] * pattern.vectors * int(pattern.kept(weight).sum()) for pattern, time in times.items()
    }
    if may_stay_dense:
        whole = Blocks(16, 1)
        estimates[None] = DENSE_VECTOR_TIME * whole.full_mask(gates, rows, columns).numel()
    return min(estimates, key=lambda pattern: estimates[pattern])


def fastest_linear_storage(
    weight: Tensor, *, backend: str | None, activation_dtype: torch.dtype | None, may_stay_dense: bool
) -> Pattern | None:
    """Return the pattern in which a linear layer is never much slower than in another, or None for a dense one.

    On a GPU one row counts alone: of many, nothing was measured.

    Args:
        weight: [1, rows, columns].
        backend, activation_dtype, may_stay_dense: as for `fastest_storage`.
    """
    whole = Blocks(16, 1).full_mask(*weight.shape).numel()
    dense = (DENSE_ROW_VECTOR_TIME * whole, DENSE_VECTOR_TIME * whole)[: 1 if _on_gpu(weight.device, backend) else None]
    shares: dict[Pattern | None, float] = {None: 1.0} if may_stay_dense else {}
    for pattern, times in _vector_times(weight.device, backend)[activation_dtype].items():
        vectors = pattern.vectors * int(pattern.kept(weight).sum())
        shares[pattern] = max(time * vectors / other for time, other in zip(times, dense, strict=False))
    return min(shares, key=lambda pattern: shares[pattern])


def pattern_to_prune_in(device: torch.device, backend: str | None) -> Pattern:
    """Return what to prune a layer in that is to run there: picks, where they do not take twice the time of blocks."""
    time = _vector_times(device, backend)[None].get(Picks())
    return Picks() if time is not None and time[0] < 2 else Blocks(16, 1)


def _vector_times(device: torch.device, backend: str | None) -> dict[torch.dtype | None, _Times]:
    """What can run there, of the row of this processor or, where its kernels do not run, of the first."""
    if _on_gpu(device, backend):
        return dict.fromkeys((None, torch.int8), GPU_VECTOR_TIMES)
    return VECTOR_TIMES.get(support.vectors() if device.type == "cpu" else "none", VECTOR_TIMES["AVX-512 with bytes"])


def _on_gpu(device: torch.device, backend: str | None) -> bool:
    return device.type == "cuda" or backend == "triton"
