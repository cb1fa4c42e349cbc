"""Which storage of a weight is the fastest: an estimate of time, made here and nowhere else.

At batch 1 a product takes the time of the vectors that are stored, 16 weights each:

    estimate = stored vectors * VECTOR_TIMES[vectors of the processor][activations][pattern]

and an ordinary matrix, multiplied by torch, that of all its vectors times DENSE_VECTOR_TIME. Patterns are compared by
what they would store of this weight, zeros that fill them up included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triton_sparse_rnn.kernels.cpu import support
from triton_sparse_rnn.sparse.patterns import Blocks, Pattern
from triton_sparse_rnn.sparse.picks import Picks

# Relative to a vector of Blocks(16, 1) in float32 on the same processor: `python -m bench.cpu.patterns vectors`, GRU of
# H = 512 at 90 % zeros, AMD Zen 4, which ran code for older processors for the other rows.
_FLOATS: dict[Pattern, float] = {
    Blocks(16, 1): 1,
    Blocks(16, 4): 1,
    Blocks(16, 16): 0.95,
    Blocks(16, 32): 0.95,
    Picks(16, 32): 1.25,
}
_BYTES: dict[Pattern, float] = {Blocks(16, 1): 0.7, Blocks(16, 4): 0.3, Blocks(16, 16): 0.3}
VECTOR_TIMES: dict[str, dict[torch.dtype | None, dict[Pattern, float]]] = {
    "AVX-512 with bytes": {None: _FLOATS, torch.int8: {**_BYTES, Picks(16, 64, 4): 0.45}},
    "AVX-512": {None: _FLOATS, torch.int8: {**_BYTES, Picks(16, 32): 1.25}},
    "AVX2": {None: {**_FLOATS, Picks(16, 32): 4.2, Picks(16, 8): 1.4}, torch.int8: {**_BYTES, Picks(16, 8): 1.4}},
    "generic": {None: {**_FLOATS, Picks(16, 32): 10}, torch.int8: {**_BYTES, Picks(16, 32): 10}},
}
DENSE_VECTOR_TIME = 0.95


def fastest_storage(
    weight: Tensor, *, backend: str | None, activation_dtype: torch.dtype | None, may_stay_dense: bool
) -> Pattern | None:
    """Return the pattern in which a weight is multiplied fastest, or None for an ordinary matrix.

    Args:
        weight: [G, H, C].
        backend: that is to run it, as for `PersistentGRU.from_dense`. "triton" has no kernel for picks.
        activation_dtype: torch.int8 for quantised activations.
        may_stay_dense: whether None is allowed.
    """
    gates, rows, columns = weight.shape
    times = _vector_times(weight.device, backend)[activation_dtype]
    estimates: dict[Pattern | None, float] = {
        pattern: time * pattern.vectors * int(pattern.kept(weight).sum()) for pattern, time in times.items()
    }
    if may_stay_dense:
        whole = Blocks(16, 1)
        estimates[None] = DENSE_VECTOR_TIME * whole.full_mask(gates, rows, columns).numel()
    return min(estimates, key=lambda pattern: estimates[pattern])


def _vector_times(device: torch.device, backend: str | None) -> dict[torch.dtype | None, dict[Pattern, float]]:
    """What can run there, of the row of this processor or, where its kernels do not run, of the first."""
    on_cpu = device.type == "cpu" and backend != "triton"
    times = VECTOR_TIMES.get(support.vectors() if on_cpu else "", VECTOR_TIMES["AVX-512 with bytes"])
    if on_cpu:
        return times
    return {dtype: {key: time for key, time in row.items() if isinstance(key, Blocks)} for dtype, row in times.items()}
