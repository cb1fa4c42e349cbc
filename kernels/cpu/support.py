"""What the kernels of this folder can run, asked without compiling and without numba at import."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from triton_sparse_rnn.sparse.block_matrix import BlockMatrix

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
MOST_COLUMNS = 1 << 16  # of quantised inputs: 255 * 127 * columns must stay below 2^31


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


def vectors() -> str:
    """Return for which vectors kernels are compiled: "AVX-512 with bytes", "AVX-512", "AVX2", "generic", "none" at all.

    "with bytes": there are vpdpbusd and vpermb, for quantised activations.
    """
    if availability() is not None:
        return "none"
    from triton_sparse_rnn.kernels.cpu import target

    path = target.vector_path()
    return f"{path} with bytes" if target.multiplies_bytes() and target.permutes_bytes() else path


def unreadable_reason(name: str, weight: BlockMatrix | Tensor, *, quantized: bool) -> str | None:
    """Return why a weight cannot run on these kernels, or None where it can.

    Args:
        name: of the weight, for the answer.
        weight: [rows, columns], in an ordinary tensor only if it multiplies x.
        quantized: whether its inputs are.
    """
    values = weight.values if isinstance(weight, BlockMatrix) else weight
    if not values.is_cpu:
        return f"{name} is on {values.device}, not on the CPU"
    if isinstance(weight, Tensor):
        return None
    if values.dtype not in WEIGHT_DTYPES:
        return f"{name} is stored as {values.dtype}, and only {', '.join(map(str, WEIGHT_DTYPES))} run here"
    if quantized and values.dtype != torch.int8:
        return f"{name} is stored as {values.dtype}, and quantised activations need torch.int8"
    if quantized and weight.shape[1] > MOST_COLUMNS:
        return f"{name} has {weight.shape[1]} columns, and sums of quantised activations hold {MOST_COLUMNS}"
    return None
