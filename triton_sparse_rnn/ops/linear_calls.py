"""A call of a linear layer: checked as torch.nn checks it, and brought to one form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from triton_sparse_rnn.ops.calls import dtypes_match
from triton_sparse_rnn.ops.validation import check_memory


class LinearLayout(NamedTuple):
    """What a layer expects of its calls."""

    columns: int  # the last axis of inputs
    rows: int  # that of outputs
    dtype: torch.dtype
    device: torch.device


def check_features(input: Tensor, layout: LinearLayout) -> None:
    """Raise unless this is an input [..., columns] for a layer; the errors are nn.Linear's, in their opening words."""
    columns, rows, *_ = layout
    if not isinstance(input, Tensor):
        raise TypeError(f"linear(): argument 'input' (position 1) must be Tensor, not {type(input).__name__}")
    if input.dim() == 0:
        raise RuntimeError("both arguments to linear need to be at least 1D, but they are 0D and 2D")
    if input.shape[-1] != columns:
        first = input.shape[:-1].numel()
        raise RuntimeError(
            f"mat1 and mat2 shapes cannot be multiplied ({first}x{input.shape[-1]} and {columns}x{rows})"
        )
    _check_kind("mat1 and mat2 must have the same dtype, but got", input, layout)


def check_channels(input: Tensor, layout: LinearLayout) -> None:
    """Raise unless this is an input [B, columns, T] or [columns, T]; the errors are those of nn.Conv1d."""
    columns, rows, *_ = layout
    if not isinstance(input, Tensor):
        raise TypeError(f"conv1d(): argument 'input' (position 1) must be Tensor, not {type(input).__name__}")
    if input.dim() not in (2, 3):
        raise RuntimeError(
            f"Expected 2D (unbatched) or 3D (batched) input to conv1d, but got input of size: {list(input.shape)}"
        )
    if input.shape[-2] != columns:
        shape = [1, *input.shape] if input.dim() == 2 else [*input.shape]
        raise RuntimeError(
            f"Given groups=1, weight of size [{rows}, {columns}, 1], expected input{shape} to have {columns} channels, "
            f"but got {shape[1]} channels instead"
        )
    if input.shape[-1] == 0:
        raise RuntimeError(
            "Calculated padded input size per channel: (0). Kernel size: (1). Kernel size can't be greater than actual "
            "input size"
        )
    _check_kind("Input type and weight type should be the same, got", input, layout)


def _check_kind(opening: str, input: Tensor, layout: LinearLayout) -> None:
    """Raise RuntimeError for an input of another dtype, device or layout, or without memory."""
    if not dtypes_match(input, layout.dtype):
        raise RuntimeError(
            f"{opening} {input.dtype} and {layout.dtype}: convert the input, input.to({layout.dtype}), or the model, "
            f"model.to({input.dtype})"
        )
    if input.device != layout.device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but got the input on {input.device}, different from the "
            f"weight on {layout.device}"
        )
    if input.layout != torch.strided:
        raise RuntimeError(f"input must have layout torch.strided, got {input.layout}: take input.to_dense()")
    check_memory("input", input)


def linear_result_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of results as nn.Linear has it: under autocast that of autocast.

    Args:
        x: as it came.
        dtype: of the layer.
    """
    device_type = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device_type) or dtype == torch.float64:
        return dtype
    return torch.get_autocast_dtype(device_type)
