"""The reference against autograd through cells that are written out, with gate nodes whose gradients become zero."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from triton_sparse_rnn.gate_gradients.backends.reference import apply_rule, direction_gradients, group_sizes
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
from triton_sparse_rnn.gate_gradients.states import rows_before

I, H = 5, 7
SEED = torch.tensor([123456789])
ALL = Needed(True, True, True, True, True)
UNIFORM, RAGGED = (4, 4, 4), (5, 5, 3, 1)
# Groups that do not fit into B and H, that do, and that are larger.
GROUPS = [
    Rule(),
    Rule(group="blocks", units=3, rows=2),
    Rule(group="blocks", units=7, rows=1),  # all units of a row
    Rule(group="blocks", units=16, rows=16),
]
RULES = [Rule(selection, rule.group, rule.units, rule.rows) for rule in GROUPS for selection in ("small", "sample")]


class Group(NamedTuple):
    """A group of the gate gradients of a step: where it is, and which rows and columns of numbers and thresholds."""

    place: Any
    n: int
    j: int
    gate: int


def groups_of(shape: Sequence[int], rule: Rule) -> list[Group]:
    B, G, H = shape
    if rule.group == "elements":
        places = itertools.product(range(B), range(G), range(H))
        return [Group((b, g, h), b, g * H + h, g) for b, g, h in places]
    corners = itertools.product(range(0, B, rule.rows), enumerate(range(0, H, rule.units)))
    return [Group((slice(b, b + rule.rows), slice(None), slice(h, h + rule.units)), b, j, 0) for b, (j, h) in corners]


def sizes_of(gates: Tensor, groups: list[Group]) -> list[float]:
    squares = gates.square()
    return [math.sqrt(squares[group.place].mean()) for group in groups]


def plain_rule(gates: Tensor, first_row: int, rule: Rule, thresholds: Tensor | None, seed: Tensor) -> Tensor:
    """`apply_rule` as the words of `Rule` have it, group by group."""
    B, G, H = gates.shape
    groups = groups_of(gates.shape, rule)
    sizes = sizes_of(gates, groups)
    numbers = uniform(seed, first_row + torch.arange(B)[:, None], torch.arange(G * H)).tolist()
    factors = torch.ones_like(gates)
    if thresholds is not None:
        for group, size in zip(groups, sizes, strict=True):
            threshold = thresholds.tolist()[group.gate]
            if size < threshold:
                kept = rule.selection == "sample" and numbers[group.n][group.j] < size / threshold
                factors[group.place] = threshold / size if kept else 0
    return gates * factors


class GateNode(Function):
    """The identity, with a rule for what goes back."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, zero: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.zero = zero
        return gates.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.zero(grads[0]), None


def lstm_step(
    direction: BackwardDirection, x: Tensor, h: Tensor, c: Tensor, node: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    gates = F.linear(x, direction.weight_ih, direction.bias_ih) + F.linear(h, direction.weight_hh, direction.bias_hh)
    i, f, g, o = node(gates.view(len(x), 4, H)).unbind(1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return [h if direction.weight_hr is None else h @ direction.weight_hr.t(), c]


def gru_step(direction: BackwardDirection, x: Tensor, h: Tensor, node: Callable[[Tensor], Tensor]) -> list[Tensor]:
    from_x = F.linear(x, direction.weight_ih, direction.bias_ih).view(len(x), 3, H)
    from_h = F.linear(h, direction.weight_hh, direction.bias_hh).view(len(x), 3, H)
    r = (from_x[:, 0] + from_h[:, 0]).sigmoid().detach()
    n_gate = from_x[:, 2] + r * from_h[:, 2]
    gates = node(torch.stack([from_x[:, 0] + from_h[:, 0], from_x[:, 1] + from_h[:, 1], n_gate], dim=1))
    # Past the node, r meets n's gradient as it is before the node: r's own gradient comes from the unzeroed one.
    r_part = (gates[:, 0].sigmoid() - r) * from_h[:, 2].detach()
    z, n = gates[:, 1].sigmoid(), (gates[:, 2] + r_part).tanh()
    return [(1 - z) * n + z * h]


class Case(NamedTuple):
    direction: BackwardDirection  # its tensors require gradients, as far as they are leaves
    outputs: list[Tensor]  # y, h_n and, for an LSTM, c_n, with a graph
    arriving: Arriving


def make_case(
    mode: Any,
    sizes: tuple[int, ...],
    *,
    reverse: bool = False,
    bias: bool = True,
    proj_size: int = 0,
    zero: Callable[[Tensor, int], Tensor] = lambda gates, first_row: gates,
) -> Case:
    """A direction in float64; `zero(gates, first_row)` is applied to the gate gradients of each step."""
    torch.manual_seed(len(sizes))
    G, R = {"LSTM": 4, "GRU": 3}[mode], proj_size or H

    def leaf(*shape: int) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64) / 2).requires_grad_()

    N, B, is_lstm = sum(sizes), sizes[0], mode == "LSTM"
    biases = [leaf(G * H) if bias else None for _ in range(2)]
    direction = BackwardDirection(
        mode=mode,
        steps=Steps(sizes, reverse),
        x=leaf(N, I),
        y=torch.empty(0),
        h0=leaf(B, R),
        c0=leaf(B, H) if is_lstm else None,
        weight_ih=leaf(G * H, I),
        weight_hh=leaf(G * H, R),
        bias_ih=biases[0],
        bias_hh=biases[1],
        weight_hr=leaf(R, H) if proj_size else None,
        workspace=None,
    )
    state = [state for state in (direction.h0, direction.c0) if state is not None]
    rows: dict[int, Tensor] = {}
    order = list(zip(direction.steps.starts, sizes, strict=True))
    for first, size in reversed(order) if reverse else order:

        def node(gates: Tensor, first: int = first) -> Tensor:
            return GateNode.apply(gates, lambda grad: zero(grad, first))  # type: ignore[reportReturnType]

        step: Callable[..., list[Tensor]] = lstm_step if is_lstm else gru_step
        new = step(direction, direction.x[first : first + size], *(part[:size] for part in state), node=node)
        state = [torch.cat([part, old[size:]]) for part, old in zip(new, state, strict=True)]
        rows[first] = new[0]
    y = torch.cat([rows[first] for first, _ in order])
    grads = [torch.randn_like(output) for output in (y, *state)]
    return Case(direction, [y, *state], Arriving(grads[0], grads[1], grads[2] if is_lstm else None))


def expected_gradients(case: Case) -> dict[str, Tensor]:
    named = {name: leaf for name, leaf in case.direction._asdict().items() if isinstance(leaf, Tensor) and leaf.is_leaf}
    named.pop("y")
    arriving = [grad for grad in case.arriving if grad is not None]
    grads = torch.autograd.grad(case.outputs, list(named.values()), arriving)
    return dict(zip(named, grads, strict=True))


def run(
    case: Case,
    rule: Rule,
    thresholds: Tensor | None,
    needed: Needed = ALL,
    *,
    seed: Tensor = SEED,
    keep_gates: bool = True,
) -> Gradients:
    parts: dict[str, Any] = case.direction._asdict() | {"y": case.outputs[0]}
    parts = {name: part.detach() if isinstance(part, Tensor) else part for name, part in parts.items()}
    decision = Decision(rule, thresholds, seed, likely_zeros=0.5, keep_gates=keep_gates)
    return direction_gradients(BackwardDirection(**parts), case.arriving, needed, decision)


def middle_thresholds(case: Case, rule: Rule) -> Tensor:
    """Thresholds by which a good part becomes zero, and not all."""
    gates = run(case, Rule(), None).gates
    assert gates is not None
    sizes = group_sizes(gates, case.direction.steps, rule)
    if rule.group == "elements":
        return sizes.transpose(0, 1).flatten(1).median(1).values.float()
    return sizes.flatten().quantile(0.5).float()[None] * (3 if rule.selection == "sample" else 1)


MODES = [("LSTM", 0), ("LSTM", 3), ("GRU", 0)]


@pytest.mark.parametrize(("mode", "proj_size"), MODES)
@pytest.mark.parametrize(("sizes", "reverse"), [(UNIFORM, True), (RAGGED, False)])
@pytest.mark.parametrize("rule", RULES[:6], ids=str)
def test_gradients_are_those_of_autograd_with_rules_at_its_gate_nodes(mode, proj_size, sizes, reverse, rule):
    dense = make_case(mode, sizes, reverse=reverse, proj_size=proj_size)
    thresholds = middle_thresholds(dense, rule)
    zeroed: dict[int, Tensor] = {}

    def zero(gates: Tensor, first_row: int) -> Tensor:
        zeroed[first_row] = plain_rule(gates, first_row, rule, thresholds, SEED)
        return zeroed[first_row]

    case = make_case(mode, sizes, reverse=reverse, proj_size=proj_size, zero=zero)
    expected = expected_gradients(case)
    gates = torch.cat([zeroed[first] for first in case.direction.steps.starts])
    result = run(case, rule, thresholds)
    for name, grad in expected.items():
        torch.testing.assert_close(getattr(result, name), grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.gates, gates, rtol=0, atol=1e-12)
    assert result.zeros.tolist() == (gates == 0).sum((0, 2)).tolist()
    assert 0 < result.zeros.sum() < gates.numel()


@pytest.mark.parametrize(("mode", "proj_size"), MODES)
@pytest.mark.parametrize(("bias", "reverse"), [(False, False), (True, True)])
@pytest.mark.parametrize("sizes", [(1,), (3,), (1, 1, 1), UNIFORM, RAGGED])
def test_without_a_threshold_gradients_are_autograds(mode, proj_size, bias, sizes, reverse):
    case = make_case(mode, sizes, reverse=reverse, bias=bias, proj_size=proj_size)
    result = run(case, Rule("sample", "blocks", 3, 2), None)
    for name, grad in expected_gradients(case).items():
        torch.testing.assert_close(getattr(result, name), grad, rtol=0, atol=1e-13)
    assert not result.zeros.any()
    assert (result.bias_ih is None) == (not bias)
    for rule in (Rule(), Rule("sample", "blocks", 3, 2)):
        with_zero = run(case, rule, torch.zeros(4 if mode == "LSTM" else 3) if rule == Rule() else torch.zeros(1))
        torch.testing.assert_close(with_zero, result, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_what_is_not_needed_is_not_given(mode):
    case = make_case(mode, UNIFORM, proj_size=3 if mode == "LSTM" else 0)
    everything, none = run(case, Rule(), None)._asdict(), Needed(*[False] * 5)
    always = {"h0", "c0", "zeros"} if mode == "LSTM" else {"h0", "zeros"}
    for name in [None, *Needed._fields]:
        needed = none if name is None else none._replace(**{name: True})
        wanted = always | {"bias": {"bias_ih", "bias_hh"}, None: set()}.get(name, {name})
        for key, value in run(case, Rule(), None, needed, keep_gates=False)._asdict().items():
            torch.testing.assert_close(value, everything[key] if key in wanted else None)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("shape", [(1, 4, 1), (5, 3, 7), (6, 4, 9), (17, 4, 18)])
def test_a_rule_is_what_its_words_say(rule, shape):
    torch.manual_seed(0)
    gates = torch.randn(shape, dtype=torch.float64)
    thresholds = torch.rand(shape[1] if rule.group == "elements" else 1) + 0.5
    result = apply_rule(gates, 11, rule, thresholds, SEED)
    torch.testing.assert_close(result, plain_rule(gates, 11, rule, thresholds, SEED), rtol=1e-14, atol=0)
    if rule.selection != "sample":
        assert torch.equal(result[result != 0], gates[result != 0])


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_sizes_of_groups(group):
    torch.manual_seed(0)
    steps = Steps(RAGGED, reverse=True)
    gates = torch.randn(sum(RAGGED), 4, H, dtype=torch.float64)
    sizes = group_sizes(gates, steps, group)
    expected = [size for step in gates.split(list(RAGGED)) for size in sizes_of(step, groups_of(step.shape, group))]
    torch.testing.assert_close(sizes.flatten(), torch.tensor(expected, dtype=torch.float64))
    assert group_sizes(gates.bfloat16(), steps, group).dtype == torch.float32


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_sampling_is_unbiased(group):
    torch.manual_seed(0)
    gates = torch.randn(5, 3, H, dtype=torch.float64)
    thresholds = torch.full((3 if group.group == "elements" else 1,), 1.5)
    rule, draws = Rule("sample", group.group, group.units, group.rows), 2_000
    seeds = torch.randint(0, 2**32, (draws, 1))
    samples = torch.stack([apply_rule(gates, 3, rule, thresholds, seed) for seed in seeds])
    deviation = samples.std(0) / math.sqrt(draws)
    assert ((samples.mean(0) - gates).abs() <= 5 * deviation + 1e-12).all()
    assert 0.2 < (samples == 0).double().mean() < 0.8


@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_sampling_leaves_every_gradient_unbiased(mode):
    """Through time too: every step draws anew. For a GRU too, as r's gradient does not depend on what n's became."""
    case, rule, draws = make_case(mode, (8, 8, 8, 8)), Rule("sample", "blocks", 3, 1), 150  # of every row
    dense, thresholds = run(case, rule, None), middle_thresholds(case, rule)
    torch.manual_seed(1)
    samples = [run(case, rule, thresholds, seed=seed) for seed in torch.randint(0, 2**32, (draws, 1))]
    for name in ("x", "h0", "weight_ih", "weight_hh", "bias_hh"):
        values = torch.stack([getattr(sample, name) for sample in samples])
        deviation = values.std(0) / math.sqrt(draws)
        assert ((values.mean(0) - getattr(dense, name)).abs() <= 5 * deviation + 1e-12).all(), name


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_always_stay(rule, value):
    gates = torch.full((5, 4, H), 1e-3)
    gates[0, 2, 3] = gates[3, 0, 6] = value
    thresholds = torch.full((4 if rule.group == "elements" else 1,), 1.0)
    result = apply_rule(gates, 0, rule, thresholds, SEED)
    strange = ~gates.isfinite()
    torch.testing.assert_close(result[strange], gates[strange], rtol=0, atol=0, equal_nan=True)
    assert result[~strange].isfinite().all()
    for group in groups_of(gates.shape, rule):  # all of a group with a strange value stays as it is
        if strange[group.place].any():
            torch.testing.assert_close(result[group.place], gates[group.place], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_gradients_far_below_a_threshold_become_zero_and_not_nan(group):
    gates = torch.tensor([1e-42, -1e-42, 0.0, -0.0]).repeat(64, 4, 16)
    thresholds = torch.full((4 if group.group == "elements" else 1,), 3e38)  # divided by such sizes it is infinite
    result = apply_rule(gates, 0, Rule("sample", group.group, group.units, group.rows), thresholds, SEED)
    assert torch.equal(result, torch.zeros_like(gates))


@pytest.mark.parametrize("sizes", [UNIFORM, RAGGED, (1,), (0, 0)])
@pytest.mark.parametrize("reverse", [False, True])
def test_states_before_every_step(sizes, reverse):
    N, B = sum(sizes), sizes[0]
    states, initial = torch.arange(N)[:, None], -1 - torch.arange(B)[:, None]
    current = initial.clone()
    steps = Steps(sizes, reverse)
    expected = torch.zeros(N, 1, dtype=torch.long)
    numbers = range(len(sizes))
    for t in reversed(numbers) if reverse else numbers:
        rows = slice(steps.starts[t], steps.starts[t] + sizes[t])
        expected[rows] = current[: sizes[t]]
        current[: sizes[t]] = states[rows]
    assert torch.equal(rows_before(states, initial, steps), expected)
