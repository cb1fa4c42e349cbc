"""torch's counter of operations counts a converted model as sparsity_report does, and a dense one as torch.nn."""

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.flop_counter import FlopCounterMode

from triton_sparse_rnn import sparsity_report, to_dense, to_sparse

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # of nn.LSTM


def converted(cell, keep: int = 3, **options) -> Any:
    layer = cell(5, 19, **options).eval()
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if "weight" in name:
                weight[:, keep:] = 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*little to skip")
        return to_sparse(nn.Sequential(layer))


def count(model: Any, *arguments: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*arguments)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("cell", "options"),
    [
        (nn.RNN, {"num_layers": 3}),
        (nn.GRU, {"bidirectional": True, "num_layers": 2, "bias": False}),
        (nn.LSTM, {"proj_size": 7, "bidirectional": True, "batch_first": True}),
        (nn.GRU, {"keep": 19}),  # the input weight stays an ordinary matrix
    ],
)
def test_two_operations_for_each_stored_weight_and_row(cell, options):
    model = converted(cell, **options)
    report = sparsity_report(model)
    for steps, batch in ((4, 3), (1, 1), (3, 0)):
        x = torch.randn(batch, steps, 5) if options.get("batch_first") else torch.randn(steps, batch, 5)
        assert count(model, x) == 2 * steps * batch * report.multiply_accumulates
        if batch:
            assert count(to_dense(model), x) == 2 * steps * batch * report.dense_multiply_accumulates
    if not options.get("bidirectional"):
        assert count(lambda: model[0].step(torch.randn(2, 5))) == 4 * report.multiply_accumulates


def test_rows_of_a_packed_sequence():
    model = converted(nn.GRU)
    packed = pack_sequence([torch.randn(steps, 5) for steps in (4, 2, 1)])
    assert count(model, packed) == 2 * 7 * sparsity_report(model).multiply_accumulates


def test_a_formula_of_the_user_goes_first():
    model = converted(nn.GRU)
    operator = torch.ops.triton_sparse_rnn.recurrent_layer
    with FlopCounterMode(display=False, custom_mapping={operator: lambda *args, **kwargs: 7}) as counter:
        model(torch.randn(4, 3, 5))
    assert counter.get_total_flops() == 7


def test_counting_changes_no_result():
    model = converted(nn.LSTM)
    x = torch.randn(4, 3, 5)
    expected = model(x)[0]
    with FlopCounterMode(display=False):
        assert torch.equal(model(x)[0], expected)


FIRST_COUNTER = """
import sys, torch
from torch import nn
from triton_sparse_rnn import to_sparse
layer = nn.GRU(4, 16, bias=False)
for weight in layer.parameters():
    weight.data[:, 1:] = 0
fast = to_sparse(layer)
assert "triton" not in sys.modules and "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    fast(torch.zeros(3, 1, 4))
assert counter.get_total_flops() == 2 * 3 * 2 * 48, counter.get_total_flops()
"""


def test_the_first_counter_of_a_process_counts():
    """It copies the formulae when it is made, and importing it loads Triton: that is left to who counts."""
    subprocess.run([sys.executable, "-c", FIRST_COUNTER], check=True)
