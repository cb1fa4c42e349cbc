"""What the kernels of this folder can run, asked without compiling and without numba at import."""

from __future__ import annotations

import functools

import torch

from triton_sparse_rnn.sparse.block_matrix import BlockMatrix

ROWS_PER_BLOCK = (1, 2, 4, 8, 16, 32)


@functools.cache
def availability() -> str | None:
    """Return why no kernel of this folder can run in this process, or None where they can."""
    try:
        from numba import config, extending  # noqa: F401
    except Exception as error:  # a broken installation may raise anything, and this is only to be reported
        return f"numba cannot be imported: {error}"
    if config.DISABLE_JIT:  # pyright: ignore[reportAttributeAccessIssue] numba sets it at run time
        return "numba compiles nothing because NUMBA_DISABLE_JIT is set"
    return None


def unsupported_reason(weight_ih: BlockMatrix, weight_hh: BlockMatrix) -> str | None:
    """Return why the weights of a layer cannot run on these kernels, or None where they can.

    Args:
        weight_ih: [G * H, I].
        weight_hh: [G * H, H].
    """
    for name, weight in (("weight_ih", weight_ih), ("weight_hh", weight_hh)):
        values = weight.values
        if values.dtype != torch.float32:
            return f"{name} is stored as {values.dtype}, and only torch.float32 runs here"
        if not values.is_cpu:
            return f"{name} is on {values.device}, not on the CPU"
    BR, BR_hh = weight_ih.values.shape[2], weight_hh.values.shape[2]
    if BR_hh != BR:
        return f"weight_ih has blocks of {BR} rows and weight_hh of {BR_hh}; they must be the same"
    if BR not in ROWS_PER_BLOCK:
        return f"the blocks have {BR} rows, and only {ROWS_PER_BLOCK} run here"
    return None
