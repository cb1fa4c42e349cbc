"""Emitted code that runs alone: vector code as a loop over the vectors of its tensors, and single kernels."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit, types
from torch import Tensor

from triton_sparse_rnn.kernels.cpu.compilation import kernel_address
from triton_sparse_rnn.kernels.cpu.intrinsics import intrinsic
from triton_sparse_rnn.kernels.cpu.vector_code import Vector, VectorCode


def on_vectors(emit: Callable[..., Vector], width: int, *, by_reciprocal: bool = False) -> Callable[..., Tensor]:
    """Return a function of tensors, whose length is a multiple of `width`, to a float32 tensor of that length.

    Args:
        emit: gets a VectorCode, the addresses of the tensors and the number of a vector; returns that of the result.
        width: floats in a vector.
    """

    @intrinsic
    def apply(typing_context, sources, target, index) -> Any:
        def generate(context, builder, signature, arguments):
            code = VectorCode(builder, width, by_reciprocal=by_reciprocal)
            addresses = [code.index(builder.extract_value(arguments[0], i)) for i in range(len(sources))]
            target, index = map(code.index, arguments[1:])
            code.store(emit(code, *addresses, index), target, index)
            return context.get_dummy_value()

        return types.void(sources, types.int64, types.int64), generate

    @njit
    def apply_all(sources, target, count):
        for index in range(count):
            apply(sources, target, index)

    def run(*tensors: Tensor) -> Tensor:
        result = torch.full(tensors[0].shape, math.nan)
        assert len(result) % width == 0
        apply_all(tuple(tensor.data_ptr() for tensor in tensors), result.data_ptr(), len(result) // width)
        return result

    return run


def on_loaded_vectors(
    function: Callable[..., Vector], width: int = 16, *, by_reciprocal: bool = False
) -> Callable[..., Tensor]:
    """The same, of a function of vectors."""
    return on_vectors(
        lambda code, *places: function(*(code.load(address, places[-1]) for address in places[:-1])),
        width,
        by_reciprocal=by_reciprocal,
    )


def call_kernel(layout: Any, fields: NamedTuple, first: int, end: int) -> None:
    """Run the kernel of this format on its fields."""
    words = np.array(fields, dtype=np.int64)
    kernel = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(kernel_address(layout))
    kernel(words.ctypes.data, first, end)
