"""The backward of one direction in plain torch: every mode, rule, dtype and device. Its twins are checked against it.

contract.py has the equations of the LSTM. Those of the GRU, where a_n = W_hn h_before + b_hn:

    dh    = grad_y[t] + carried dh
    dn    = dh (1 - z) (1 - n^2)
    gates = (dn a_n r (1 - r),  dh (h_before - n) z (1 - z),  dn)          r's comes from n's as it was
    gates = rule(gates)
    carried dh = dh z + (gates r, gates z, gates n o r) W_hh

Products are taken in the dtype of the layer, for which gate gradients are rounded to it after the rule; those that this
makes zero are counted too. All else is float32, or float64 in a float64 layer. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from triton_sparse_rnn.gate_gradients.contract import (
    Arriving,
    BackwardDirection,
    Decision,
    Gradients,
    Needed,
    Rule,
    Steps,
)
from triton_sparse_rnn.gate_gradients.random import uniform
from triton_sparse_rnn.gate_gradients.states import (
    gru_gates,
    lstm_cells,
    lstm_gates,
    rows_before,
    wide_dtype,
)

ZeroSmall = Callable[[Tensor, int], Tensor]  # gate gradients of a step [B_t, G, H] and its first row -> the same


def unsupported_reason(direction: BackwardDirection, rule: Rule) -> None:
    """None: it runs all there is."""


def direction_gradients(
    direction: BackwardDirection, arriving: Arriving, needed: Needed, decision: Decision
) -> Gradients:
    """Go back through time; see `contract.BackwardBackend`. Products are always dense."""

    def zero_small(gates: Tensor, first_row: int) -> Tensor:
        return apply_rule(gates, first_row, decision.rule, decision.thresholds, decision.seed)

    h_before = rows_before(direction.y, direction.h0, direction.steps)
    if direction.mode == "LSTM":
        gates, h0, c0, weight_hr = _lstm_through_time(direction, arriving, h_before, zero_small)
        hidden_gates = gates
    else:
        gates, hidden_gates, h0 = _gru_through_time(direction, arriving, h_before, zero_small)
        c0 = weight_hr = None
    rows, hidden_rows = gates.flatten(1), hidden_gates.flatten(1)
    needs_bias = needed.bias and direction.bias_ih is not None
    return Gradients(
        x=rows @ direction.weight_ih if needed.x else None,
        h0=h0,
        c0=c0,
        weight_ih=rows.t() @ direction.x if needed.weight_ih else None,
        weight_hh=hidden_rows.t() @ h_before if needed.weight_hh else None,
        bias_ih=rows.sum(0) if needs_bias else None,
        bias_hh=hidden_rows.sum(0) if needs_bias else None,
        weight_hr=weight_hr if needed.weight_hr else None,
        zeros=(gates == 0).sum((0, 2)),
        gates=gates if decision.keep_gates else None,
    )


def _lstm_through_time(
    direction: BackwardDirection, arriving: Arriving, h_before: Tensor, zero_small: ZeroSmall
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of the linear gates [N, 4, H], of h0 and c0, and with proj_size of weight_hr."""
    steps, weight_hr, dtype = direction.steps, direction.weight_hr, direction.x.dtype
    assert direction.c0 is not None
    assert arriving.c is not None
    activated = lstm_gates(direction, h_before)
    wide = activated.dtype
    c = lstm_cells(activated, direction.c0, steps)
    c_before, tanh_c = rows_before(c, direction.c0.to(wide), steps), c.tanh()
    i, f, g, o = activated.unbind(1)
    ifg_by_c = torch.stack([g * i * (1 - i), c_before * f * (1 - f), i * (1 - g * g)], dim=1)
    o_by_h, c_by_h = tanh_c * o * (1 - o), o * (1 - tanh_c * tanh_c)

    gates = torch.empty_like(activated, dtype=dtype)
    output_grads = torch.empty_like(direction.y)  # filled with proj_size only
    dh, dc = arriving.h.to(wide, copy=True), arriving.c.to(wide, copy=True)
    for first, size in reversed(steps.ranges):
        rows = slice(first, first + size)
        step_dh = dh[:size] + arriving.y[rows]
        if weight_hr is not None:
            output_grads[rows] = step_dh
            step_dh = (output_grads[rows] @ weight_hr).to(wide)
        step_dc = dc[:size] + step_dh * c_by_h[rows]
        step_gates = torch.cat([step_dc[:, None] * ifg_by_c[rows], (step_dh * o_by_h[rows])[:, None]], dim=1)
        gates[rows] = zero_small(step_gates, first)
        dc[:size] = step_dc * f[rows]
        dh[:size] = gates[rows].flatten(1) @ direction.weight_hh
    grad_weight_hr = None if weight_hr is None else output_grads.t() @ (o * tanh_c).to(dtype)
    return gates, dh.to(dtype), dc.to(dtype), grad_weight_hr


def _gru_through_time(
    direction: BackwardDirection, arriving: Arriving, h_before: Tensor, zero_small: ZeroSmall
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the linear gates and of W_hh h + b_hh, each [N, 3, H], and of h0."""
    steps, dtype = direction.steps, direction.x.dtype
    activated, n_from_h = gru_gates(direction, h_before)
    r, z, n = activated.unbind(1)
    n_by_h = (1 - z) * (1 - n * n)
    gates_by_h = torch.stack([n_by_h * n_from_h * r * (1 - r), (h_before - n) * z * (1 - z), n_by_h], dim=1)

    gates = torch.empty_like(activated, dtype=dtype)
    hidden_gates = torch.empty_like(gates)
    dh = arriving.h.to(activated.dtype, copy=True)
    for first, size in reversed(steps.ranges):
        rows = slice(first, first + size)
        step_dh = dh[:size] + arriving.y[rows]
        gates[rows] = zero_small(step_dh[:, None] * gates_by_h[rows], first)
        hidden_gates[rows, :2] = gates[rows, :2]
        hidden_gates[rows, 2] = gates[rows, 2] * r[rows]
        dh[:size] = step_dh * z[rows] + hidden_gates[rows].flatten(1) @ direction.weight_hh
    return gates, hidden_gates, dh.to(dtype)


def apply_rule(gates: Tensor, first_row: int, rule: Rule, thresholds: Tensor | None, seed: Tensor) -> Tensor:
    """Make the small gate gradients of one step zero.

    Args:
        gates: [B_t, G, H], float32 or float64.
        first_row: where the step starts among all rows, for `random.uniform`.
        rule, thresholds, seed: see `contract.Decision`.
    Returns:
        [B_t, G, H], of the dtype of gates.
    """
    if thresholds is None:
        return gates
    sizes = _step_sizes(gates, rule)
    threshold = thresholds.to(gates.dtype)
    threshold = threshold[:, None] if rule.group == "elements" else threshold
    small = sizes < threshold  # false for NaN and infinity
    if rule.selection == "small":
        return gates.where(_spread(~small, gates, rule), 0)
    kept = ~small | (_random_numbers(gates, first_row, rule, seed) * threshold < sizes)
    scaled = gates * _spread((threshold / sizes).where(small, 1), gates, rule)
    return scaled.where(_spread(kept, gates, rule), 0)


def group_sizes(gates: Tensor, steps: Steps, rule: Rule) -> Tensor:
    """Return the size v of every group, as `Rule` defines it.

    Args:
        gates: [N, G, H], gate gradients.
        steps: which rows belong to which step.
        rule: its groups.
    Returns:
        float32, or float64 for such gates. elements: [N, G, H]. blocks: [blocks of rows, ceil(H / units)], of all steps
        one behind the other.
    """
    return torch.cat([_step_sizes(step, rule) for step in gates.split(list(steps.batch_sizes))])


def _step_sizes(gates: Tensor, rule: Rule) -> Tensor:
    """`group_sizes` of one step [B_t, G, H]."""
    gates = gates.to(wide_dtype(gates.dtype))
    if rule.group == "elements":
        return gates.abs()
    B, G, H = gates.shape
    rows, units = min(B, rule.rows), min(H, rule.units)
    squares = F.pad(gates.square().sum(1), (0, -H % units, 0, -B % rows))
    blocks = squares.view(-(-B // rows), rows, -(-H // units), units)
    rows, units = (_lengths(total, size, gates) for total, size in ((B, rows), (H, units)))
    return (blocks.sum((1, 3)) / (rows[:, None] * units * G)).sqrt()


def _lengths(total: int, size: int, like: Tensor) -> Tensor:
    """The lengths of the pieces of an axis: `size`, and what is left for the last one."""
    return (total - torch.arange(0, total, size, dtype=torch.int64, device=like.device)).clamp(max=size)


def _spread(values: Tensor, gates: Tensor, rule: Rule) -> Tensor:
    """Give each gate gradient of a step what its group has: [groups...] -> what broadcasts to [B_t, G, H]."""
    if rule.group == "elements":
        return values
    B, _, H = gates.shape
    values = values.repeat_interleave(min(B, rule.rows), dim=0)[:B]
    return values.repeat_interleave(min(H, rule.units), dim=1)[:, None, :H]


def _random_numbers(gates: Tensor, first_row: int, rule: Rule, seed: Tensor) -> Tensor:
    """The numbers u of all groups of a step, of the shape of `_step_sizes`."""
    B, G, H = gates.shape
    like = {"dtype": torch.int64, "device": gates.device}
    if rule.group == "elements":
        n = first_row + torch.arange(B, **like)[:, None]
        return uniform(seed, n, torch.arange(G * H, **like)).view(B, G, H)
    n = first_row + torch.arange(0, B, rule.rows, **like)[:, None]
    return uniform(seed, n, torch.arange(-(-H // rule.units), **like))
