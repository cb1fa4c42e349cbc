"""A budget lets through what is right in its precision, and nothing that is wrong."""

import copy

import pytest
import torch

from bench.budgets import ROUNDINGS, assert_within_budget, budget
from bench.time_loop import CELLS, run_time_loop
from bench.workloads import Workload


@pytest.fixture(params=CELLS)
def work(request):
    return Workload(cell=request.param, H=48, sparsity=0.5, T=7, B=3)


def test_time_loop_is_the_layer(work):
    layer, x = copy.deepcopy(work.layer).double(), work.x.double()
    weight_ih, weight_hh, bias_ih, bias_hh = layer.parameters()
    y = run_time_loop(work.cell, x @ weight_ih.T + bias_ih, lambda h: h @ weight_hh.T + bias_hh)
    torch.testing.assert_close(y, layer(x)[0])


def test_budgets_grow_as_numbers_get_narrower(work):
    order = ["float32", "float16 weights", "bfloat16 weights", "bfloat16"]
    for allowed in zip(*(budget(work, precision) for precision in order), strict=True):
        assert list(allowed) == sorted(allowed)
    weights, both = budget(work, "int8 weights"), budget(work, "int8")
    assert weights.largest < both.largest < 0.5  # states reach 1
    assert weights.rms < both.rms < 0.05


@pytest.mark.parametrize("precision", ["float32", *ROUNDINGS])
def test_right_passes_and_wrong_fails(work, precision):
    y = work.layer(work.x)[0]
    assert assert_within_budget(y, work, precision).largest < 1e-5
    forgetful = copy.deepcopy(work.layer)
    forgetful.get_parameter("weight_hh_l0").zero_()
    swapped = copy.deepcopy(work.layer)
    for parameter in swapped.parameters():
        parameter.copy_(parameter.roll(work.H // 2, dims=0))  # units, and gates where there are several
    one_wrong = y.index_put((torch.tensor(3), torch.tensor(1), torch.tensor(7)), y[3, 1, 7] + 1)
    results = forgetful(work.x)[0], swapped(work.x)[0], y.flip(1), y.roll(1, dims=0), one_wrong, y * torch.nan, y[:, :1]
    for wrong in results:
        with pytest.raises(AssertionError):
            assert_within_budget(wrong, work, precision)


@pytest.mark.parametrize("precision", ["float32", *ROUNDINGS])
def test_small_faults_fail_too(precision):
    work = Workload(H=48, sparsity=0.5, T=7, B=3)
    for name in ("bias_ih_l0", "bias_hh_l0"):
        without_bias = copy.deepcopy(work.layer)
        without_bias.get_parameter(name).zero_()
        with pytest.raises(AssertionError):
            assert_within_budget(without_bias(work.x)[0], work, precision)
    with pytest.raises(AssertionError):
        assert_within_budget(_reset_before_the_product(work), work, precision)


def _reset_before_the_product(work):
    """The GRU of the first paper, and ONNX's default: W_hn (r h) in place of r (W_hn h)."""
    weight_ih, weight_hh, bias_ih, bias_hh = work.layer.parameters()
    h, outputs = torch.zeros(work.B, work.H), []
    for p_r, p_z, p_n in ((x @ weight_ih.T + bias_ih).chunk(3, dim=1) for x in work.x):
        a_r, a_z, _ = (h @ weight_hh.T + bias_hh).chunk(3, dim=1)
        r, z = (p_r + a_r).sigmoid(), (p_z + a_z).sigmoid()
        n = (p_n + (r * h) @ weight_hh[2 * work.H :].T + bias_hh[2 * work.H :]).tanh()
        h = n + z * (h - n)
        outputs.append(h)
    return torch.stack(outputs)
