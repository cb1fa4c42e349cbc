"""How far a result may be from the exact one, float64: a small multiple of what its arithmetic costs by itself.

A right result in narrow numbers is far from float64, a wrong one farther still. So each precision has a budget of its
own. For narrow numbers it comes from the same layer where weights, and what they are multiplied with, are rounded as
that precision rounds them, and nothing else is; for float32 from PyTorch's own layer. The largest error may be 4 times
as large as there, for it is one unlucky number. The root of the mean square is steadier and may be twice as large: a
GRU in int8 without one of its biases, or that applies its reset gate to h, exceeds that. In float32 it may be 4 times
as large, because sums in another order are as right. So may that of a layer that is narrow throughout, h included: its
budget too comes from PyTorch's own layer of that dtype, on the CPU.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.time_loop import run_time_loop
from bench.workloads import Workload

Rounding = Callable[[Tensor], Tensor]
EXACT_STEPS_ON_CPU = 64


class Error(NamedTuple):
    """Of a result, over all steps and units."""

    largest: float
    rms: float


def assert_within_budget(y: Tensor, work: Workload, precision: str, like: Workload | None = None) -> Error:
    """Fail unless y [T, B, H] is within the budget of `precision`; returns its error.

    The budget is that of `like`, a workload with fewer steps or rows where those of `work` would take long.
    """
    error, allowed = _error(y, work), budget(like or work, precision)
    within = error.largest <= allowed.largest and error.rms <= allowed.rms
    assert within, f"{error} exceeds {allowed} of {precision}, so there is nothing to time"
    return error


@functools.lru_cache(maxsize=16)
def budget(work: Workload, precision: str) -> Error:
    """Return the error allowed in a precision, which is in OWN or a key of ROUNDINGS."""
    y = work.layer(work.x)[0] if precision in OWN else _rounded_result(work, *ROUNDINGS[precision])
    error = _error(y, work)
    eps = torch.finfo(torch.float32).eps
    return Error(4 * error.largest + eps, (4 if precision in OWN else 2) * error.rms + eps)


def _error(y: Tensor, work: Workload) -> Error:
    exact = _exact(work)
    assert y.shape == exact.shape, f"got y {tuple(y.shape)}, wanted {tuple(exact.shape)}"
    assert y.isfinite().all(), "y is not finite"
    difference = (y - exact).abs()
    return Error(difference.max().item(), difference.square().mean().sqrt().item())


@functools.lru_cache(maxsize=4)
def _exact(work: Workload) -> Tensor:
    """Run in float64. For a GPU, whose sequences are long, all but the first steps come from float64 on that GPU."""
    layer, x = copy.deepcopy(work.layer).double(), work.x.double()
    if work.device == "cpu":
        return layer(x)[0]
    first = layer(x[:EXACT_STEPS_ON_CPU])[0]
    y = layer.to(work.device)(x.to(work.device))[0].cpu()
    torch.testing.assert_close(y[:EXACT_STEPS_ON_CPU], first, rtol=0, atol=1e-10)
    return y


def _rounded_result(work: Workload, weights: Rounding, activations: Rounding) -> Tensor:
    weight_ih, weight_hh, bias_ih, bias_hh = (parameter.double() for parameter in work.layer.parameters())
    weight_ih, weight_hh = weights(weight_ih), weights(weight_hh)
    projected = F.linear(activations(work.x.double()), weight_ih, bias_ih)
    return run_time_loop(work.cell, projected, lambda h: F.linear(activations(h), weight_hh, bias_hh))


def _unchanged(values: Tensor) -> Tensor:
    return values


def _to(dtype: torch.dtype) -> Rounding:
    return lambda values: values.to(dtype).to(values.dtype)


def _int8_weights(values: Tensor) -> Tensor:
    """As torch's dynamic quantisation: symmetric, one scale for the whole weight."""
    step = values.abs().max() / 127
    return (values / step).round() * step


def _int8_activations(values: Tensor) -> Tensor:
    """As torch's dynamic quantisation on x86: 7 bits from the smallest value to the largest, so that sums fit."""
    step = (values.max().clamp(min=0) - values.min().clamp(max=0)).clamp(min=1e-9) / 127
    return (values / step).round() * step


def _tf32(values: Tensor) -> Tensor:
    """What matrix units read of a float32: its first 10 bits behind the point."""
    return (values.float().view(torch.int32) & -(1 << 13)).view(torch.float32).to(values.dtype)


OWN = ("float32", "float16 layer", "bfloat16 layer")  # as torch.nn itself, in the dtype of the workload
ROUNDINGS = {  # of weights, of inputs and states
    "tf32": (_tf32, _tf32),
    "float16 weights": (_to(torch.float16), _unchanged),
    "bfloat16 weights": (_to(torch.bfloat16), _unchanged),
    "int8 weights": (_int8_weights, _unchanged),
    "bfloat16": (_to(torch.bfloat16), _to(torch.bfloat16)),
    "int8": (_int8_weights, _int8_activations),
}
