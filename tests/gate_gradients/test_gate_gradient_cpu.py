"""The backward on the CPU against the reference in float64, and what it takes forward's word for."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from rounding import rounding_of_sums
from torch import Tensor

from triton_sparse_rnn.gate_gradients.backends import cpu, reference
from triton_sparse_rnn.gate_gradients.backends.cpu import _states, direction_gradients, unsupported_reason
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
from triton_sparse_rnn.kernels.cpu.gate_gradients import products as gate_products
from triton_sparse_rnn.kernels.cpu.gate_gradients.through_time import GateGradients

ALL = Needed(True, True, True, True, False)
SEED = torch.tensor([77])
CASES = {  # batch sizes, I, H
    "one number": ((1,), 1, 1),
    "one step": ((5,), 6, 40),
    "one row": ((1,) * 9, 3, 17),
    "whole vectors": ((4,) * 6, 32, 48),
    "gates in whole kilobytes": ((2,) * 3, 4, 64),  # oneDNN leaves a gap behind them
    "units left over": ((3,) * 7, 70, 37),
    "ragged": ((6, 6, 5, 2, 1, 1), 9, 37),
    "many rows": ((40,) * 8, 10, 20),
}
BLOCKS = (64, 1), (16, 2), (5, 3), (100, 100)  # the first: whole rows, the last: whole steps
GROUPS = [Rule(), *(Rule("small", "blocks", *size) for size in BLOCKS)]
RULES = [*GROUPS, *(dataclasses.replace(rule, selection="sample") for rule in GROUPS)]


@pytest.fixture(autouse=True)
def _same_numbers_and_one_thread():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def apart(rows: Tensor) -> Tensor:
    """The same rows, with NaN between them."""
    return torch.cat([rows, torch.full_like(rows, math.nan)], dim=1)[:, : rows.shape[1]]


def random_direction(
    name: str, *, reverse: bool, forward: bool = False, bias: bool = True
) -> tuple[BackwardDirection, Arriving]:
    """A direction of an LSTM; with `forward` y and the workspace are oneDNN's, else y is anything."""
    sizes, I, H = CASES[name]
    N, T, B = sum(sizes), len(sizes), sizes[0]
    weights = [torch.randn(4 * H, I) / I**0.5, torch.randn(4 * H, H) / H**0.5, *torch.randn(2, 4 * H)]
    x, h0, c0 = torch.randn(N, I), torch.randn(B, H).tanh(), torch.randn(B, H)
    y, workspace = torch.randn(N, H).tanh(), None
    if forward:
        with torch.enable_grad():
            y, _, _, workspace = torch.ops.aten.mkldnn_rnn_layer(
                x.view(T, B, I), *weights, h0, c0, reverse, [], 2, H, 1, True, False, False, True
            )
        y = y.reshape(N, H)
    direction = BackwardDirection(
        mode="LSTM",
        steps=Steps(sizes, reverse),
        x=apart(x),
        y=apart(y),
        h0=apart(h0),
        c0=apart(c0),
        weight_ih=apart(weights[0]),
        weight_hh=weights[1],
        bias_ih=weights[2] if bias else None,
        bias_hh=weights[3] if bias else None,
        weight_hr=None,
        workspace=workspace,
    )
    grad_y, grad_h, grad_c = (apart(torch.randn(rows, H) / H**0.5) for rows in (N, B, B))
    return direction, Arriving(grad_y, grad_h, grad_c)


def fitting_thresholds(direction: BackwardDirection, arriving: Arriving, rule: Rule, share: float = 0.6) -> Tensor:
    """Thresholds that zero about this share of a dense backward, and that no size comes near.

    Else it would be up to the rounding of sums whether a size is below. Each is in the middle of the widest gap between
    the sizes that are not much smaller or larger.
    """
    gates = run(direction, arriving, rule, None).gates
    assert gates is not None
    if rule.group == "elements":
        sizes = gates.abs().transpose(0, 1).flatten(1)
    else:
        sizes = reference.group_sizes(gates, direction.steps, rule).flatten()[None]
    sizes = torch.cat([sizes, 2 * sizes.amax(1, keepdim=True)], dim=1).sort(dim=1).values  # above the largest too
    last = sizes.shape[1] - 1
    reach = 2 + last // 50
    near = sizes[:, max(0, round(share * last) - reach) : round(share * last) + reach + 1]
    gaps = near.diff(dim=1)
    widest = gaps.argmax(1, keepdim=True)
    gap, below = gaps.gather(1, widest), near.gather(1, widest)
    assert (gap > 1e3 * torch.finfo(gates.dtype).eps * (below + gap)).all()
    return (below + gap / 2).flatten()


def run(
    direction: BackwardDirection, arriving: Arriving, rule: Rule, thresholds: Tensor | None, **options: Any
) -> Gradients:
    settings: dict[str, Any] = {"seed": SEED, "likely_zeros": 0.0, "keep_gates": True} | options
    needed = settings.pop("needed", ALL)
    return direction_gradients(direction, arriving, needed, Decision(rule, thresholds, **settings))


def by_reference(
    direction: BackwardDirection, arriving: Arriving, rule: Rule, thresholds: Tensor | None, dtype: torch.dtype
) -> Gradients:
    tensors: list[Any] = [
        field.to(dtype) if isinstance(field, Tensor) else field for field in direction._replace(workspace=None)
    ]
    grads = Arriving(*(grad.to(dtype) for grad in arriving if grad is not None))
    return reference.direction_gradients(
        BackwardDirection(*tensors), grads, ALL, Decision(rule, thresholds, SEED, keep_gates=True)
    )


def assert_as_accurate_as_the_reference(
    result: Gradients, direction: BackwardDirection, arriving: Arriving, rule: Rule, thresholds: Tensor | None
) -> None:
    """The same zeros as in float64, and errors of the size of those of the reference in float32.

    Its sums may have rounded better. Ours are of as many terms: at every step the gates' of x and h and the four gates
    on the way back, then all rows.
    """
    (N, I), H, T = direction.x.shape, direction.y.shape[1], len(direction.steps.batch_sizes)
    rounding = rounding_of_sums(T * (I + H + 2 + 4 * H) + N)
    exact, rough = (by_reference(direction, arriving, rule, thresholds, d) for d in (torch.float64, torch.float32))
    assert torch.equal(result.zeros, exact.zeros)
    for name in ("x", "h0", "c0", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "gates"):
        ours, right, theirs = (getattr(gradients, name) for gradients in (result, exact, rough))
        if right is None:
            assert ours is None
            continue
        assert ours.dtype == torch.float32
        assert ours.shape == right.shape
        error, their_error = (ours - right).abs().max(), (theirs - right).abs().max()
        assert error <= 4 * their_error + rounding * right.abs().max(), name
    assert result.bias_ih is None or result.bias_ih is not result.bias_hh  # each may be scaled in place
    assert result.weight_hr is None


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("likely_zeros", [0.0, 0.9])
def test_dense_backward(name, reverse, likely_zeros):
    direction, arriving = random_direction(name, reverse=reverse)
    result = run(direction, arriving, Rule(), None, likely_zeros=likely_zeros)
    assert_as_accurate_as_the_reference(result, direction, arriving, Rule(), None)
    for rule in RULES[::2]:
        thresholds = torch.zeros(4 if rule.group == "elements" else 1)
        zero = run(direction, arriving, rule, thresholds, likely_zeros=likely_zeros)
        assert torch.equal(zero.gates, result.gates)  # type: ignore[arg-type]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.selection}-{rule.group}-{rule.units}")
def test_every_rule(rule, name, reverse):
    direction, arriving = random_direction(name, reverse=reverse)
    thresholds = fitting_thresholds(direction, arriving, rule)
    for likely_zeros in (0.0, 0.9):
        result = run(direction, arriving, rule, thresholds, likely_zeros=likely_zeros)
        assert_as_accurate_as_the_reference(result, direction, arriving, rule, thresholds)


@pytest.mark.parametrize("rule", [*RULES[:2], *RULES[5:7]], ids=str)
def test_nothing_is_made_zero_by_thresholds_of_zero(rule):
    direction, arriving = random_direction("units left over", reverse=False)
    thresholds = torch.zeros(4 if rule.group == "elements" else 1)
    sparse, dense = (run(direction, arriving, rule, each).gates for each in (thresholds, None))
    assert sparse is not None
    assert dense is not None
    assert torch.equal(sparse, dense)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("rule", GROUPS[:2], ids=str)
def test_every_share_of_zeros(share, rule):
    direction, arriving = random_direction("many rows", reverse=False, bias=False)
    thresholds = fitting_thresholds(direction, arriving, rule, share) * {0.0: 0, 1.0: 1e4}.get(share, 1)
    result = run(direction, arriving, rule, thresholds, likely_zeros=share)
    assert abs(result.zeros.sum() / direction.y.numel() / 4 - share) < 0.25
    assert_as_accurate_as_the_reference(result, direction, arriving, rule, thresholds)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", [name for name in CASES if name != "ragged"])
def test_gates_of_forward_are_taken(name, reverse):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    direction, arriving = random_direction(name, reverse=reverse, forward=True)
    assert direction.workspace is not None
    _, gates, _ = _states(direction, torch.full_like(direction.y, math.nan))
    assert gates.untyped_storage().data_ptr() == direction.workspace.untyped_storage().data_ptr()
    rule = Rule("sample")
    thresholds = fitting_thresholds(direction, arriving, rule)
    result = run(direction, arriving, rule, thresholds)
    assert_as_accurate_as_the_reference(result, direction, arriving, rule, thresholds)


def test_gates_that_forward_did_not_have_are_computed_again():
    direction, arriving = random_direction("units left over", reverse=True, forward=True)
    assert direction.workspace is not None
    forged = [
        torch.randint(256, direction.workspace.shape, dtype=torch.uint8),
        torch.full_like(direction.workspace, 255),  # NaN
        torch.zeros_like(direction.workspace),
        direction.workspace.roll(4),
        direction.workspace[:100],
        direction.workspace[:0],
    ]
    expected = run(direction._replace(workspace=None), arriving, Rule(), None)
    for workspace in forged:
        result = run(direction._replace(workspace=workspace), arriving, Rule(), None)
        for ours, right in zip(result, expected, strict=True):
            assert ours is right if ours is None or right is None else torch.equal(ours, right)


@pytest.mark.parametrize("likely_zeros", [0.0, 0.9])
def test_inputs_stay_as_they_are_and_what_is_not_needed_is_none(likely_zeros):
    direction, arriving = random_direction("whole vectors", reverse=False)
    before = [field.clone() for field in (*direction, *arriving) if isinstance(field, Tensor)]
    nothing = Needed(False, False, False, False, False)
    thresholds = fitting_thresholds(direction, arriving, Rule(), 0.9)
    result = run(direction, arriving, Rule(), thresholds, needed=nothing, likely_zeros=likely_zeros, keep_gates=False)
    names = [name for name, value in result._asdict().items() if value is not None]
    assert names == ["h0", "c0", "zeros"]
    after = [field for field in (*direction, *arriving) if isinstance(field, Tensor)]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    only_hh = run(direction, arriving, Rule(), thresholds, needed=nothing._replace(weight_hh=True))
    assert only_hh.weight_ih is None
    everything = run(direction, arriving, Rule(), thresholds)
    torch.testing.assert_close(only_hh.weight_hh, everything.weight_hh)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("rule", [*GROUPS[:3], Rule("sample")], ids=str)
@pytest.mark.parametrize("likely_zeros", [0.0, 0.9])
def test_nan_and_infinity_are_kept(value, rule, likely_zeros):
    direction, arriving = random_direction("many rows", reverse=False)
    arriving.y[-1, 3] = value  # row 39 of the last step
    huge = torch.full((4 if rule.group == "elements" else 1,), 1e30)
    result = run(direction, arriving, rule, huge, likely_zeros=likely_zeros)
    assert result.gates is not None
    assert not result.gates[-1, :, 3].isfinite().all()
    assert result.weight_ih is not None
    assert not result.weight_ih.isfinite().all()
    others = torch.ones(len(direction.x), dtype=torch.bool)
    others[39::40] = False
    if rule.group == "elements" or rule.rows == 1:
        assert not result.gates[others].any()


def test_thresholds_of_any_stride():
    direction, arriving = random_direction("whole vectors", reverse=False)
    thresholds = fitting_thresholds(direction, arriving, Rule()).mean()
    one, four = thresholds.expand(4), thresholds.repeat(4)
    assert torch.equal(run(direction, arriving, Rule(), one).zeros, run(direction, arriving, Rule(), four).zeros)


@pytest.mark.parametrize(
    ("threads", "share", "large", "expected"),
    [
        (1, 0.6, False, ("skipping", "SkippingProducts")),
        (2, 0.6, False, ("dense", "DenseProducts")),
        (2, 0.6, True, ("dense", "SkippingProducts")),
        (8, 0.8, True, ("dense", "SkippingProducts")),
        (2, 0.8, False, ("skipping", "SkippingProducts")),
        (8, 0.1, True, ("dense", "DenseProducts")),
    ],
)
def test_zeros_are_skipped_where_that_is_faster(threads, share, large, expected, monkeypatch):
    """The loop skips on one thread, and only large products after it are shared."""
    direction, arriving = random_direction("many rows", reverse=False)
    thresholds = fitting_thresholds(direction, arriving, Rule(), share)
    taken, loops, choose = [], {"go_back": "dense", "go_back_skipping": "skipping"}, cpu._products
    for name, way in loops.items():
        method = getattr(GateGradients, name)
        monkeypatch.setattr(
            GateGradients, name, lambda *args, method=method, way=way: (taken.append(way), method(*args))[1]
        )

    def recorded(*arguments):
        products = choose(*arguments)
        taken.append(type(products).__name__)
        return products

    monkeypatch.setattr(cpu, "_products", recorded)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(gate_products, "_THREAD_TERMS", 1 if large else 1 << 40)
    run(direction, arriving, Rule(), thresholds, likely_zeros=share)
    assert tuple(taken) == expected


def test_what_is_not_supported_is_said():
    direction, _ = random_direction("one step", reverse=False)
    assert unsupported_reason(direction, Rule()) is None
    reasons = [
        (direction._replace(x=direction.x.to("meta")), "on meta"),
        (direction._replace(mode="GRU"), "a GRU"),
        (direction._replace(x=direction.x.double()), "torch.float64"),
        (direction._replace(weight_hr=torch.ones(2, 40)), "proj_size"),
    ]
    for other, reason in reasons:
        assert reason in (unsupported_reason(other, Rule()) or "")


def test_random_numbers_are_those_of_the_reference_to_the_last_bit():
    """Thresholds for which a number that is 2^-21 larger or smaller than random.uniform's would decide otherwise."""
    direction, arriving = random_direction("one number", reverse=False)
    gates = run(direction, arriving, Rule(), None).gates
    assert gates is not None
    for number in range(100):
        seed = torch.tensor([number * 40_503_001])
        boundary = gates.flatten().abs() / uniform(seed, torch.tensor(0), torch.arange(4))
        for factor, is_kept in ((1 + 5e-7, False), (1 - 5e-7, True)):
            sampled = run(direction, arriving, Rule("sample"), boundary * factor, seed=seed).gates
            assert sampled is not None
            assert torch.equal(sampled.flatten() != 0, torch.full((4,), is_kept))
