"""A training pass of an LSTM on a GPU: cuDNN's, and ours with a share of its gate gradients made zero.

Forward is cuDNN's either way. Each layer has settled before it is timed, and its gradients are held against the
reference's. `bash bench/gpu_check.sh DIR` runs it.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from bench.gate_gradient_check import assert_right, measured_zeros, settle
from bench.gpu.compiling import compile_seconds
from bench.gpu.timing import median_device_us, synchronized
from triton_sparse_rnn import GateGradientSparsity, SparseLSTM
from triton_sparse_rnn.gate_gradients.backends import triton
from triton_sparse_rnn.gate_gradients.contract import Decision, Gradients

pytestmark = pytest.mark.gpu

EVENT_SECONDS = 0.1  # of timing by events, besides what pytest-benchmark does
ROUNDING = {torch.float32: 0.01, torch.bfloat16: 0.05}  # of TF32, for float32
BLOCKS = {"rule": "stochastic", "structure": "blocks"}
OURS: dict[str, dict[str, Any] | None] = {
    "nn.LSTM": None,
    "no zeros": {"threshold": 0.0},
    "80% zeros": {"target": 0.8},
    "90% zeros": {"target": 0.9},
    "50% of blocks": {"target": 0.5, **BLOCKS},
    "no zeros in blocks": {"threshold": 0.0, **BLOCKS},
}


class Work(NamedTuple):
    """Sizes of a layer with as many inputs as units."""

    H: int
    B: int
    T: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"H{self.H}_B{self.B}_T{self.T}_{str(self.dtype).removeprefix('torch.')}"


# The most wanted first: what begins too late is left out.
WORKS = [Work(*sizes) for sizes in itertools.product((1024, 2048), (64,), (64,), (torch.float32, torch.bfloat16))]
WORKS += [Work(*sizes) for sizes in itertools.product((512, 256), (64,), (64,), (torch.float32, torch.bfloat16))]
WORKS += [Work(H, 16, 256, dtype) for H in (1024, 2048, 512, 256) for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("contender", OURS)
@pytest.mark.parametrize("work", WORKS, ids=str)
def bench_forward_and_backward(benchmark, work: Work, contender: str):
    with compile_seconds() as compiled:
        layer, x, grad_y = prepare(work, contender)

    def run() -> None:
        layer(x)[0].backward(grad_y)

    time_on_gpu(benchmark, work, contender, "forward and backward", run, sum(compiled))
    benchmark.extra_info["zeros"] = measured_zeros(layer)


@pytest.mark.parametrize("contender", OURS)
@pytest.mark.parametrize("work", WORKS, ids=str)
def bench_backward(benchmark, work: Work, contender: str):
    with compile_seconds() as compiled:
        layer, x, grad_y = prepare(work, contender)
    y = layer(x)[0]
    run = functools.partial(y.backward, grad_y, retain_graph=True)
    time_on_gpu(benchmark, work, contender, "backward", run, sum(compiled))
    benchmark.extra_info["zeros"] = measured_zeros(layer)


def time_on_gpu(benchmark, work: Work, contender: str, what: str, run, compile_s: float) -> None:
    """Time by the device's clock, which gives the fact `device_us`, and by the host's."""
    benchmark.group = f"{what}, {work}"
    facts = {"H": work.H, "I": work.H, "B": work.B, "T": work.T, "dtype": str(work.dtype), "contender": contender}
    facts |= {"device": torch.cuda.get_device_name(), "tf32": torch.backends.cudnn.allow_tf32}
    benchmark.extra_info.update(facts | {"device_us": median_device_us(run, EVENT_SECONDS)})
    benchmark.extra_info["compile_s"] = compile_s
    benchmark(synchronized(run))


def prepare(work: Work, contender: str) -> tuple[nn.LSTM, Tensor, Tensor]:
    """Return a layer whose zeros have settled and whose gradients are right, its input, and what arrives at y."""
    torch.manual_seed(0)
    options = OURS[contender]
    shape, where = (work.T, work.B, work.H), {"device": "cuda", "dtype": work.dtype}
    x, grad_y = torch.randn(shape, **where, requires_grad=True), torch.randn(shape, **where) / work.H**0.5
    if options is None:
        return nn.LSTM(work.H, work.H, **where), x, grad_y
    layer = SparseLSTM(work.H, work.H, gate_gradient=GateGradientSparsity(backend="triton", **options), **where)
    settle(layer, x, grad_y, options.get("target", 0.0))
    check(layer, x, grad_y, ROUNDING[work.dtype])
    return layer, x, grad_y


def check(layer: nn.LSTM, x: Tensor, grad_y: Tensor, rounding: float) -> None:
    """Fail unless the gradients of a pass are right."""
    backward = triton.direction_gradients

    def checked(direction: Any, arriving: Any, needed: Any, decision: Decision) -> Gradients:
        arguments = direction, arriving, needed, decision._replace(keep_gates=True)
        ours = backward(*arguments)
        assert_right(ours, arguments, rounding)
        return ours

    with mock.patch.object(triton, "direction_gradients", checked):
        layer(x)[0].backward(grad_y)
