"""The check before a timing finds gradients that are wrong."""

import pytest
import torch

from bench.gate_gradient_check import assert_right, measured_zeros
from triton_sparse_rnn import GateGradientSparsity, SparseLSTM
from triton_sparse_rnn.gate_gradients.backends import cpu
from triton_sparse_rnn.gate_gradients.contract import Arriving, BackwardDirection, Decision, Needed, Rule, Steps


def make_call(rule):
    torch.manual_seed(0)
    T, B, I, H = 12, 4, 5, 40
    weights = torch.randn(4 * H, I) / I, torch.randn(4 * H, H) / H, torch.randn(4 * H), torch.randn(4 * H)
    states = torch.randn(T * B, I), torch.randn(T * B, H).tanh(), torch.randn(B, H), torch.randn(B, H)
    direction = BackwardDirection("LSTM", Steps((B,) * T, False), *states, *weights, weight_hr=None, workspace=None)
    arriving = Arriving(torch.randn(T * B, H), torch.randn(B, H), torch.randn(B, H))
    decision = Decision(rule, torch.full((4,), 0.2), torch.tensor([3]), likely_zeros=0.8, keep_gates=True)
    return direction, arriving, Needed(True, True, True, True, False), decision


@pytest.mark.parametrize("rule", [Rule(), Rule("sample")])
def test_right(rule):
    call = make_call(rule)
    assert_right(cpu.direction_gradients(*call), call, 1e-5)


def test_wrong_gate_gradients():
    call = make_call(Rule())
    ours = cpu.direction_gradients(*call)
    assert ours.gates is not None
    ours.gates[:, 2, :10] = 0
    with pytest.raises(AssertionError, match="of the gate gradients are wrong"):
        assert_right(ours, call, 1e-5)


@pytest.mark.parametrize("name", ["x", "h0", "weight_hh", "bias_ih"])
def test_wrong_gradients(name):
    call = make_call(Rule())
    ours = cpu.direction_gradients(*call)
    getattr(ours, name)[0] *= 1.01
    with pytest.raises(AssertionError, match=f"the gradient of {name} is off"):
        assert_right(ours, call, 1e-5)


def test_measured_zeros():
    layer = SparseLSTM(3, 4, gate_gradient=GateGradientSparsity(threshold=1e9))
    layer(torch.randn(2, 1, 3))[0].sum().backward()
    assert measured_zeros(layer) == 1
    assert measured_zeros(torch.nn.LSTM(3, 4)) == 0
