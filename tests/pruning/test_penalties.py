import pytest
import torch
from pruner_training import gru
from torch import nn

from triton_sparse_rnn.pruning import group_lasso, l1
from triton_sparse_rnn.sparse.patterns import Blocks
from triton_sparse_rnn.sparse.picks import Picks


def rnn_weights(model):
    return [weight for name, weight in model.named_parameters() if "weight_ih" in name or "weight_hh" in name]


@pytest.mark.parametrize("block_size", [(1, 1), (16, 1), (2, 3), (4, 4)])
def test_group_lasso_sums_the_norms_of_blocks_inside_gates(block_size):
    model = nn.Sequential(nn.LSTM(5, 7, num_layers=2, bidirectional=True, proj_size=3), nn.Linear(2, 2)).double()
    BR, BC = block_size
    expected = sum(
        gate[row : row + BR, column : column + BC].norm()
        for weight in rnn_weights(model)
        for gate in weight.split(7)
        for row in range(0, 7, BR)
        for column in range(0, weight.shape[1], BC)
    )
    torch.testing.assert_close(group_lasso(model, block_size), expected)


def test_l1_sums_recurrent_and_input_weights():
    model = gru(5, 7, num_layers=2)
    torch.testing.assert_close(l1(model), sum(weight.abs().sum() for weight in rnn_weights(model)))


def unit_norms(part, pattern):
    """For each weight of 16 rows of up to 32 columns the norm of its block of 16x1, or of its picked unit."""
    if pattern is Picks:
        return part.abs().sort(dim=-1).values.norm(dim=0)[part.abs().argsort(dim=-1).argsort(dim=-1)]
    return part.norm(dim=0).expand_as(part)


@pytest.mark.parametrize(
    ("penalty", "pattern"), [(group_lasso, Picks), (lambda layer: group_lasso(layer, (16, 1)), Blocks), (l1, None)]
)
def test_gradient_is_right_and_zero_at_zeros(penalty, pattern):
    layer = gru(3, 16).double()
    nn.init.zeros_(layer.weight_ih_l0)
    with torch.no_grad():
        layer.weight_hh_l0[:16, 0] = 0
    penalty(layer).backward()
    assert layer.weight_ih_l0.grad is not None
    assert layer.weight_hh_l0.grad is not None
    assert not layer.weight_ih_l0.grad.any()
    assert not layer.weight_hh_l0.grad[:16, 0].any()
    part, gradient = layer.weight_hh_l0[16:32].detach(), layer.weight_hh_l0.grad[16:32]
    torch.testing.assert_close(gradient, part / unit_norms(part, pattern) if pattern else part.sign())
    assert layer.bias_hh_l0.grad is None


@pytest.mark.parametrize("penalty", [group_lasso, l1])
def test_tied_weights_count_once_and_parametrized_ones_count(penalty):
    two = nn.ModuleList([nn.RNN(4, 4), nn.RNN(4, 4)])
    two[1].weight_ih_l0 = two[0].weight_ih_l0
    alone = penalty(two[0]) + penalty(two[1])
    tied = nn.RNN(4, 4)
    tied.weight_ih_l0, tied.weight_hh_l0 = two[0].weight_ih_l0, two[0].weight_ih_l0
    torch.testing.assert_close(penalty(two), alone - penalty(tied))
    before = penalty(two[1]).item()
    nn.utils.parametrize.register_parametrization(two[1], "weight_hh_l0", nn.Identity())
    assert penalty(two[1]).item() == pytest.approx(before)


def test_nothing_to_penalise_is_an_error():
    with pytest.raises(ValueError, match=r"model has no nn\.RNN"):
        l1(nn.Linear(2, 2))
    for penalty in (group_lasso, l1):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
            penalty("x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pattern"):
        group_lasso(gru(2, 2), (0, 1))
