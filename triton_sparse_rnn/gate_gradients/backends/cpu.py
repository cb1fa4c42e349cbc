"""The backward of one direction on the CPU by numba vector code: the twin of reference.py for what it supports."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from triton_sparse_rnn.gate_gradients.contract import Arriving, BackwardDirection, Decision, Gradients, Needed, Rule
from triton_sparse_rnn.gate_gradients.states import lstm_gates, rows_before

if TYPE_CHECKING:  # these need numba
    from triton_sparse_rnn.kernels.cpu.gate_gradients.products import DenseProducts, SkippingProducts
    from triton_sparse_rnn.kernels.cpu.gate_gradients.through_time import GateGradients

# Of an AMD Zen4, on as many threads:
SKIPPING_FROM = 0.3  # of zeros: from there on products without them are faster than dense ones
_LEAST_TIME = 0.1  # of a dense product, which one takes even if nearly all are zeros


def unsupported_reason(direction: BackwardDirection, rule: Rule) -> str | None:
    """Why the kernels cannot run this backward; None if they can."""
    x = direction.x
    if not x.is_cpu:
        return f"it needs tensors on the CPU, these are on {x.device}"
    if direction.mode != "LSTM":
        return f"it runs an LSTM, this is a {direction.mode}"
    if x.dtype != torch.float32:
        return f"it computes in torch.float32, the layer's dtype is {x.dtype}"
    if direction.weight_hr is not None:
        return "it does not run an LSTM with proj_size"
    return None


def direction_gradients(
    direction: BackwardDirection, arriving: Arriving, needed: Needed, decision: Decision
) -> Gradients:
    """Go back through time; see `contract.BackwardBackend`."""
    from triton_sparse_rnn.kernels.cpu.gate_gradients.step import GateGradientFormat
    from triton_sparse_rnn.kernels.cpu.gate_gradients.through_time import GateGradients

    assert direction.c0 is not None
    assert arriving.c is not None
    rule, thresholds, seed, likely_zeros, keep_gates = decision
    h_before = rows_before(direction.y, direction.h0, direction.steps)
    steps, activated, c = _states(direction, h_before)
    N, H = c.shape
    kernel = GateGradientFormat("all")
    if thresholds is not None:
        kernel = GateGradientFormat(rule.selection, grouped=rule.group == "blocks")
    grads, block = (arriving.y, arriving.h, arriving.c), (rule.rows, rule.units)
    back = GateGradients(kernel, steps, activated, c, direction.c0, *grads, thresholds, seed, block)
    if _skipping_pays(likely_zeros, torch.get_num_threads()):
        back.go_back_skipping(direction.weight_hh)
    else:
        back.go_back(direction.weight_hh)

    gates, products = back.gates, _products(back, direction)
    inputs = {"weight_ih": direction.x, "weight_hh": h_before}
    inputs = {name: rows for name, rows in inputs.items() if getattr(needed, name)}
    weights = dict(zip(inputs, products.transposed_times(*inputs.values()), strict=True))
    bias = gates.sum(0) if needed.bias and direction.bias_ih is not None else None
    return Gradients(
        x=products.times(direction.weight_ih) if needed.x else None,
        h0=back.dh,
        c0=back.dc,
        weight_ih=weights.get("weight_ih"),
        weight_hh=weights.get("weight_hh"),
        bias_ih=bias,
        bias_hh=None if bias is None else bias.clone(),
        weight_hr=None,
        zeros=back.zeros,
        gates=gates.view(N, 4, H) if keep_gates else None,
    )


def _products(back: GateGradients, direction: BackwardDirection) -> DenseProducts | SkippingProducts:
    """Return the fastest way to multiply the gates of all steps."""
    from triton_sparse_rnn.kernels.cpu.gate_gradients.products import DenseProducts, SkippingProducts

    gates, zeros, threads = back.gates, back.zeros.sum().item(), torch.get_num_threads()
    skipping = SkippingProducts(gates, threads)
    more_threads = threads / skipping.threads_for(direction.x.shape[1])
    if zeros > 0 and _skipping_pays(zeros / gates.numel(), more_threads):
        return skipping
    return DenseProducts(gates, keeps_shape=not direction.steps.is_ragged)


def _skipping_pays(zeros: float, more_threads: float) -> bool:
    """Whether a product without this share of zeros is faster than a dense one on so many times its threads.

    In the time loop skipping has one thread, since a step is too short to be shared.
    """
    time = _LEAST_TIME + (1 - _LEAST_TIME) * (1 - zeros) / (1 - SKIPPING_FROM)  # of the dense one
    return time * more_threads <= 1


def _states(direction: BackwardDirection, h_before: Tensor) -> tuple[np.ndarray, Tensor, Tensor]:
    """Return PlaceFields, activated gates [rows, 4 H] and c [N, H]: with the gates that forward kept, if it did."""
    from triton_sparse_rnn.kernels.cpu.gate_gradients.through_time import lstm_cells, place_steps

    assert direction.c0 is not None
    (sizes, reverse), y = direction.steps, direction.y
    gates = _saved_gates(direction)
    if gates is not None:
        steps = place_steps(sizes, reverse=reverse, gates_as_taken=True)
        c, right = lstm_cells(steps, gates, direction.c0, y)
        if right:
            return steps, gates, c
    gates = lstm_gates(direction, h_before).flatten(1)
    steps = place_steps(sizes, reverse=reverse, gates_as_taken=False)
    return steps, gates, lstm_cells(steps, gates, direction.c0, y)[0]


def _saved_gates(direction: BackwardDirection) -> Tensor | None:
    """Return where oneDNN 3 keeps i, f, g, o of every row, [N, 4 H], in the order in which it takes the steps.

    That is written down nowhere, so `lstm_cells` must find it right.
    """
    workspace, (N, H) = direction.workspace, direction.y.shape
    if workspace is None or direction.steps.is_ragged:
        return None
    row = -(-4 * H // 16) * 16
    row += 16 if row % 256 == 0 else 0
    numbers = workspace.view(torch.uint8).flatten()
    numbers = numbers[: numbers.numel() // 4 * 4].view(torch.float32)
    return numbers[: N * row].view(N, row)[:, : 4 * H] if numbers.numel() >= N * row else None
