"""A training pass of an LSTM on one thread: nn.LSTM, and ours with a share of its gate gradients made zero.

Forward is torch's own either way. The last benchmark times the parts of a backward, each by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from bench.gate_gradient_check import assert_right, measured_zeros, settle
from triton_sparse_rnn import GateGradientSparsity, SparseLSTM
from triton_sparse_rnn.gate_gradients.backends import cpu, reference
from triton_sparse_rnn.gate_gradients.contract import Arriving, BackwardDirection, Decision, Gradients, Needed
from triton_sparse_rnn.kernels.cpu.compilation import kernel_function
from triton_sparse_rnn.kernels.cpu.gate_gradients.products import DenseProducts, SkippingProducts
from triton_sparse_rnn.kernels.cpu.gate_gradients.step import GateGradientFormat
from triton_sparse_rnn.kernels.cpu.gate_gradients.through_time import GateGradients

B, T = 32, 64
SIZES = (256, 512, 1024)  # H, and I
ROUNDING = 1e-5
OURS: dict[str, dict[str, Any] | None] = {
    "nn.LSTM": None,
    "no zeros": {"threshold": 0.0},
    **{
        f"{rule}, {target:.0%} zeros": {"target": target, "rule": rule}
        for rule in ("deterministic", "stochastic")
        for target in (0.5, 0.8, 0.9)
    },
}


class Call(NamedTuple):
    """What a backward was given, and what it gave."""

    direction: BackwardDirection
    arriving: Arriving
    needed: Needed
    decision: Decision
    gradients: Gradients


@pytest.mark.parametrize("contender", OURS)
@pytest.mark.parametrize("H", SIZES)
def bench_forward_and_backward(benchmark, H: int, contender: str):
    layer, x, grad_y = prepare(H, contender)
    describe(benchmark, H, contender, "forward and backward")
    benchmark.pedantic(lambda: layer(x)[0].backward(grad_y), rounds=10 if H < 1024 else 5, warmup_rounds=1)
    benchmark.extra_info["zeros"] = measured_zeros(layer)


@pytest.mark.parametrize("contender", OURS)
@pytest.mark.parametrize("H", SIZES)
def bench_backward(benchmark, H: int, contender: str):
    layer, x, grad_y = prepare(H, contender)
    describe(benchmark, H, contender, "backward")
    benchmark.pedantic(
        lambda y: y.backward(grad_y), setup=lambda: ((layer(x)[0],), {}), rounds=10 if H < 1024 else 5, warmup_rounds=1
    )
    benchmark.extra_info["zeros"] = measured_zeros(layer)


@pytest.mark.parametrize("contender", ["nn.LSTM", "no zeros"])
@pytest.mark.parametrize("H", SIZES)
def bench_forward(benchmark, H: int, contender: str):
    layer, x, _ = prepare(H, contender)
    describe(benchmark, H, contender, "forward")
    benchmark.pedantic(lambda: layer(x), rounds=10, warmup_rounds=1)


@pytest.mark.parametrize("part", ["whole backward", "states", "steps", "loop", "x", "weights", "biases"])
@pytest.mark.parametrize("zeros", ["no zeros", "deterministic, 80% zeros", "deterministic, 90% zeros"])
@pytest.mark.parametrize("H", SIZES)
def bench_parts(benchmark, H: int, zeros: str, part: str):
    """The loop holds the steps and, for each, the product with W_hh."""
    describe(benchmark, H, part, f"parts of a backward with {zeros}")
    benchmark.pedantic(parts(H, zeros)[part], rounds=10 if H < 1024 else 5, warmup_rounds=1)


def prepare(H: int, contender: str) -> tuple[nn.LSTM, Tensor, Tensor]:
    """Return a layer whose zeros have settled and whose gradients are right, its input, and what arrives at y."""
    torch.manual_seed(0)
    options = OURS[contender]
    x, grad_y = torch.randn(T, B, H, requires_grad=True), torch.randn(T, B, H) / H**0.5
    if options is None:
        return nn.LSTM(H, H), x, grad_y
    layer = SparseLSTM(H, H, gate_gradient=GateGradientSparsity(backend="cpu", **options))
    settle(layer, x, grad_y, options.get("target", 0.0))
    call = record(layer, x, grad_y)
    arguments = call.direction, call.arriving, call.needed, call.decision._replace(keep_gates=True)
    assert_right(cpu.direction_gradients(*arguments), arguments, ROUNDING)
    return layer, x, grad_y


def record(layer: nn.LSTM, x: Tensor, grad_y: Tensor) -> Call:
    """Run a pass; returns the call of its backward."""
    calls: list[Call] = []
    backward = cpu.direction_gradients

    def recording(*arguments: Any) -> Gradients:
        calls.append(Call._make((*arguments, backward(*arguments))))
        return calls[-1].gradients

    with mock.patch.object(cpu, "direction_gradients", recording):
        layer(x)[0].backward(grad_y)
    (call,) = calls
    return call


@functools.lru_cache(maxsize=1)
def parts(H: int, zeros: str) -> dict[str, Callable[[], Any]]:
    """Return what runs a part of the backward of a settled layer."""
    call = record(*prepare(H, zeros))
    direction, arriving, _, (rule, thresholds, seed, *_), gradients = call
    h_before = reference.rows_before(direction.y, direction.h0, direction.steps)
    steps, activated, c = cpu._states(direction, h_before)
    kernel = GateGradientFormat(rule.selection)
    assert direction.c0 is not None
    assert arriving.c is not None
    grads = (arriving.y, arriving.h, arriving.c)
    back = GateGradients(kernel, steps, activated, c, direction.c0, *grads, thresholds, seed)
    skips = gradients.zeros.sum() > cpu.SKIPPING_FROM * back.gates.numel()
    loop = back.go_back_skipping if skips else back.go_back
    loop(direction.weight_hh)
    products = SkippingProducts(back.gates) if skips else DenseProducts(back.gates, keeps_shape=True)
    step_back = kernel_function(kernel)

    def go_back_without_products() -> None:
        for number in reversed(range(T)):
            step_back(back.fields, number, number + 1)

    return {
        "whole backward": lambda: cpu.direction_gradients(*call[:4]),
        "states": lambda: cpu._states(direction, h_before),
        "steps": go_back_without_products,
        "loop": lambda: loop(direction.weight_hh),
        "x": lambda: products.times(direction.weight_ih),
        "weights": lambda: products.transposed_times(direction.x, h_before),
        "biases": lambda: back.gates.sum(0),
    }


def describe(benchmark, H: int, contender: str, what: str) -> None:
    benchmark.group = f"LSTM H={H} B={B} T={T}, {what}"
    facts = {"T": T, "B": B, "I": H, "H": H, "threads": torch.get_num_threads(), "torch": torch.__version__}
    benchmark.extra_info.update(facts, contender=contender)
