"""The time loop of gate gradients with every program in a process of its own, under conduct that breaks others."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from gate_gradient_layers import Layer, assert_close
from program_processes import DIED, Conduct, InProcesses, ProgramId

from triton_sparse_rnn.gate_gradients.contract import Rule
from triton_sparse_rnn.kernels.triton.gate_gradients import loop as gate_gradient_loop
from triton_sparse_rnn.kernels.triton.gate_gradients import through_time as gate_gradient_time

ELEMENTS = Rule("sample", "elements")
BLOCKS = Rule("sample", "blocks", units=16, rows=16)
THETAS = {"elements": [0.3, 0.2, 0.6, 0.1], "blocks": [0.5]}
RAGGED = [18, 17, 17, 2]
IMPATIENT = 300  # polls, a second or so


@triton.jit
def do_not_wait(words, base_ptr, columns, stride_bytes, status_ptr, spin_limit, PACK, PORTABLE):
    return words.to(tl.float32, bitcast=True)


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> InProcesses:
    """The kernel, in processes, which is taken for all programs that there are; `how` and `outcomes` are those."""
    torch.manual_seed(0)
    in_processes = InProcesses(gate_gradient_loop.gate_gradient_steps)
    monkeypatch.setattr(gate_gradient_loop, "gate_gradient_steps", in_processes)
    monkeypatch.setattr(gate_gradient_time.BackwardLoop, "_capacity", lambda *arguments: 100)
    gate_gradient_time.status_of(torch.device("cpu")).zero_()
    return in_processes


def all_programs(P: int, conduct: Conduct, slices: int = 1) -> dict[ProgramId, Conduct]:
    return dict.fromkeys(itertools.product(range(P), range(slices), [0]), conduct)


@pytest.mark.parametrize("rule", [ELEMENTS, BLOCKS], ids=lambda rule: rule.group)
@pytest.mark.parametrize("reverse", [False, True])
def test_several_programs_and_slices(loop: InProcesses, rule: Rule, reverse: bool):
    layer = Layer(37, RAGGED, reverse=reverse)
    assert_close(layer.run(rule, THETAS[rule.group]), layer.exact(rule, THETAS[rule.group]))
    (outcome,) = loop.outcomes
    assert len(outcome.writes) == 6
    T, words = len(RAGGED), 3
    for (p, i), writes in zip(itertools.product(range(3), range(2)), outcome.writes, strict=True):
        owned = torch.zeros_like(writes)
        steps = T if i == 0 else sum(size > 16 for size in RAGGED)
        owned[i, :steps, p] = 1
        assert torch.equal(writes, owned)
        assert owned.shape == (2, T, words + 1, 1)


@pytest.mark.parametrize("p", [0, 1])
def test_the_others_wait_for_a_late_program(loop: InProcesses, p: int):
    layer = Layer(30, [3, 3, 2])
    loop.how["conduct"] = {(p, 0, 0): Conduct(late_s=0.5)}
    assert_close(layer.run(BLOCKS, [0.7]), layer.exact(BLOCKS, [0.7]))


def test_delays_change_nothing(loop: InProcesses):
    layer = Layer(61, [2, 2, 2, 2], reverse=True)
    loop.how["conduct"] = all_programs(4, Conduct(delay_s=0.01, seed=1))
    assert_close(layer.run(ELEMENTS, THETAS["elements"]), layer.exact(ELEMENTS, THETAS["elements"]))


def test_a_reader_that_does_not_wait_is_seen(loop: InProcesses):
    layer = Layer(30, [3, 3, 2])
    loop.how |= {"conduct": {(1, 0, 0): Conduct(late_s=0.5)}, "replaced": {"wait": do_not_wait}}
    got, exact = layer.run(BLOCKS, [0.7]), layer.exact(BLOCKS, [0.7])
    with pytest.raises(AssertionError):
        assert_close(got, exact)


def test_the_others_end_when_a_program_dies_and_the_next_call_raises(
    loop: InProcesses, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gate_gradient_time, "SPIN_LIMIT", IMPATIENT)
    layer = Layer(37, [2] * 6)
    loop.how |= {"conduct": {(1, 0, 0): Conduct(dies_in_slot=3)}, "limit_s": 40.0}
    gradients = layer.run(BLOCKS, [0.1])
    (outcome,) = loop.outcomes
    assert outcome.exit_codes == {(0, 0, 0): 0, (1, 0, 0): DIED, (2, 0, 0): 0}
    assert gradients.gates is not None
    by_others = gradients.gates.view(6, 2, 4, 37)[:, :, :, [0, 36]].isnan()
    assert by_others[:2].all()  # the word of step 3 was its last, so nobody has all of step 2
    assert not by_others[2:].any()
    assert gradients.h0[:, [0, 36]].isnan().all()
    loop.how.clear()
    with pytest.raises(RuntimeError, match="an earlier backward with gate_gradient on cpu gave up"):
        layer.run(BLOCKS, [0.1])
    assert_close(layer.run(BLOCKS, [0.1]), layer.exact(BLOCKS, [0.1]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_travel_and_are_no_zeros(loop: InProcesses, value: float):
    layer = Layer(20, [2, 2, 2])
    layer.arriving.y[4, 3] = value
    got: Any = layer.run(BLOCKS, [1e9])
    exact = layer.exact(BLOCKS, [1e9])
    assert exact.h0.isnan().any()
    assert not exact.h0.isnan().all()
    assert_close(got, exact)
