"""Rows times an ordinary matrix, by the faster of torch.mm and oneDNN's inner product.

On one core of an AMD Zen4 oneDNN took 0.55 to 0.95 of torch.mm's time for the 32 rows of a step, 0.8 to 0.95 for 2048.
But it compiles, for 1 to 10 ms, for every number of rows that it has not met, and wants the matrix in its own layout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

_Operators = tuple[Callable[..., Tensor], Callable[..., Tensor]]  # inner product, layout of a matrix
_ENOUGH_ROWS = 256  # of inputs in all, to be worth a layout or a compilation


def multiply_dense(inputs: Tensor, matrix: Tensor) -> Tensor:
    """Return inputs [N, K] times matrix [K, M]; N should be the same in many calls."""
    operators = _inner_product(matrix)
    if operators is None or len(inputs) < _ENOUGH_ROWS:
        return inputs @ matrix
    return operators[0](inputs, matrix.t(), None, "none", [], "")


def prepare_product(matrix: Tensor, rows: int, times: int) -> Callable[[Tensor], Tensor]:
    """Return a function of inputs [.., K] to inputs times matrix [K, M], which is to stay as it is.

    Args:
        matrix: [K, M].
        rows: the most inputs in a call.
        times: how many calls there will be.
    """
    operators = _inner_product(matrix)
    if operators is None or rows * times < _ENOUGH_ROWS:
        return lambda inputs: inputs @ matrix
    inner_product, lay_out = operators
    packed = lay_out(matrix.t(), rows)
    return lambda inputs: inner_product(inputs, packed, None, "none", [], "")


def _inner_product(matrix: Tensor) -> _Operators | None:
    """Return what multiplies by a matrix, if that may be used."""
    return _operators() if torch.backends.mkldnn.enabled and matrix.numel() > 0 else None


@functools.cache
def _operators() -> _Operators | None:
    """Return torch's operators for oneDNN's inner product and for the layout of its matrix, if they do that.

    torch.compile uses them, and nobody else was promised them.
    """
    try:
        inner_product, lay_out = torch.ops.mkldnn._linear_pointwise, torch.ops.mkldnn._reorder_linear_weight
        numbers = torch.arange(12, dtype=torch.float32, device="cpu")
        inputs, matrix = numbers[:6].view(2, 3), numbers.view(3, 4)
        product = inner_product(inputs, lay_out(matrix.t(), 2), None, "none", [], "")
        does = torch.equal(product, inputs @ matrix)
    except Exception:  # whatever an operator raises that takes something else
        return None
    return (inner_product, lay_out) if does else None
