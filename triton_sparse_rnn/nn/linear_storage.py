"""How the weight of a linear layer is stored when it is converted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from triton_sparse_rnn.nn.advice import warn_if_dense
from triton_sparse_rnn.nn.computed_weights import check_not_by_hook, read_weight
from triton_sparse_rnn.nn.storage_choice import fastest_linear_storage
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.patterns import Pattern


def read_matrix(dense: nn.Module) -> Tensor:
    """Return the weight [rows, columns] of a linear layer as it is now.

    Raises:
        ValueError: a hook computes it, or it is on the meta device.
    """
    check_not_by_hook(dense, "weight")
    weight = read_weight(dense, "weight")
    if weight.is_meta:
        raise ValueError("weight is on the meta device and holds no weights to convert")
    return weight.flatten(1)


def store_linear(
    dense: Any,
    dtype: torch.dtype,
    pattern: Pattern | None,
    *,
    backend: str | None = None,
    activation_dtype: torch.dtype | None = None,
) -> dict[str, BlockMatrix | Tensor]:
    """Return copies of weight and bias by name: the matrix in blocks or picks, the bias as it is.

    Args:
        dense: an nn.Linear, or an nn.Conv1d of kernel size 1.
        dtype: in which the matrix is stored.
        pattern: in which it is, None for `fastest_linear_storage`.
        backend, activation_dtype: with which the layer is to run.
    Raises:
        ValueError: a hook computes a weight, or it cannot be stored in dtype or in `pattern`.
    """
    weight = read_matrix(dense)
    if pattern is None:
        own = fastest_linear_storage(
            weight[None], backend=backend, activation_dtype=activation_dtype, may_stay_dense=False
        )
        assert own is not None
    else:
        rows, columns = weight.shape
        pattern.check_size(rows, columns, "weight", "storage")
        own = pattern
    density = own.kept(weight[None]).double().mean().item()
    warn_if_dense("weight", weight, own, density, named=pattern, backend=backend, recurrent=False)
    weights: dict[str, BlockMatrix | Tensor] = {"weight": BlockMatrix.from_dense(weight, own, dtype=dtype)}
    if dense.bias is not None:
        check_not_by_hook(dense, "bias")
        weights["bias"] = read_weight(dense, "bias").clone(memory_format=torch.contiguous_format)
    return weights


def gains(dense: nn.Module, *, backend: str | None = None, activation_dtype: torch.dtype | None = None) -> bool:
    """Whether a linear layer runs faster from stored weights, by the estimate of `fastest_linear_storage`."""
    weight = read_matrix(dense)[None]
    options: dict[str, Any] = {"backend": backend, "activation_dtype": activation_dtype}
    return fastest_linear_storage(weight, **options, may_stay_dense=True) is not None
