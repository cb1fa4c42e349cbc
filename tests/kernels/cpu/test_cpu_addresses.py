"""No kernel is given the address of what it would read as something else, or past its end."""

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from triton_sparse_rnn.kernels.cpu import addresses
from triton_sparse_rnn.kernels.cpu.addresses import address_of, address_of_rows
from triton_sparse_rnn.kernels.cpu.gate_gradients.step import GateGradientFormat
from triton_sparse_rnn.kernels.cpu.gate_gradients.through_time import GateGradients, lstm_cells, place_steps
from triton_sparse_rnn.kernels.cpu.recurrent_layer import RecurrentLayer
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.layer_weights import LayerWeights

FOLDER = Path(addresses.__file__).parent


def freed(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().resize_(8)
    return tensor


def test_right_ones():
    x = torch.ones(3, 4)
    assert address_of("x", x, torch.float32, 12) == x.data_ptr()
    assert address_of("x", x[1:], torch.float32, 5) == x[1:].data_ptr()
    assert address_of_rows("x", x[:, 1:], 3, 3) == x.data_ptr() + 4
    address_of("x", x[:0], torch.float32, 0)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            torch.ones(6, dtype=torch.bfloat16),
            "x must be 6 numbers of torch.float32 on the CPU, got 6 of torch.bfloat16",
        ),
        (torch.ones(6, device="meta"), "got 6 of torch.float32 on meta"),
        (torch.ones(5), "got 5 of torch.float32 on cpu"),
        (torch.ones(12)[::2], r"x must be contiguous, got strides \(2,\)"),
        (freed(torch.ones(6)), "x has no memory for its numbers"),
    ],
)
def test_wrong_ones(tensor, message):
    with pytest.raises(ValueError, match=message):
        address_of("x", tensor, torch.float32, 6)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.ones(3, 2).double(), "got 6 of torch.float64"),
        (
            torch.ones(2, 3).t(),
            r"x must have 3 rows of 2 numbers side by side, got shape \(3, 2\) and strides \(1, 3\)",
        ),
        (torch.ones(2, 3), r"got shape \(2, 3\)"),
        (torch.ones(3, 1).expand(3, 2), r"and strides \(1, 0\)"),
        (freed(torch.ones(3, 2)), "x has no memory"),
    ],
)
def test_wrong_rows(matrix, message):
    with pytest.raises(ValueError, match=message):
        address_of_rows("x", matrix, 3, 2)


@pytest.mark.parametrize("change", ["starts", "columns", "bias"])
def test_a_layer_of_wrong_tensors(change):
    matrix = BlockMatrix.from_dense(torch.eye(6, 2), (2, 1), gates=3)
    bias = torch.zeros(6, dtype=torch.bfloat16 if change == "bias" else torch.float32)
    if change != "bias":
        object.__setattr__(matrix, change, getattr(matrix, change).long())
    with pytest.raises(ValueError, match=rf"{change} must be \d+ numbers of torch\.\w+32 on the CPU"):
        RecurrentLayer("GRU", [LayerWeights(matrix, matrix, bias, bias)], quantized=False)


@pytest.mark.parametrize("name", ["gates", "c0", "y"])
def test_states_of_wrong_tensors(name):
    steps = place_steps([2, 2], reverse=False, gates_as_taken=False)
    tensors = {"gates": torch.ones(4, 12), "c0": torch.ones(2, 3), "y": torch.ones(4, 3)}
    lstm_cells(steps, **tensors)
    with pytest.raises(ValueError, match=f"{name} must be"):
        lstm_cells(steps, **{**tensors, name: tensors[name].double()})


@pytest.mark.parametrize("name", ["activated", "c0", "grad_y", "grad_h", "grad_c", "thresholds", "seed"])
def test_gate_gradients_of_wrong_tensors(name):
    N, B, H = 4, 2, 3
    tensors: dict[str, Any] = {
        "activated": torch.ones(N, 4 * H),
        "c": torch.ones(N, H),
        "c0": torch.ones(B, H),
        "grad_y": torch.ones(N, H),
        "grad_h": torch.ones(B, H),
        "grad_c": torch.ones(B, H),
        "thresholds": torch.ones(4),
        "seed": torch.ones(1, dtype=torch.int64),
    }
    steps = place_steps([2, 2], reverse=False, gates_as_taken=False)
    GateGradients(GateGradientFormat("small"), steps, **tensors)
    with pytest.raises(ValueError, match=f"{name} must be"):
        GateGradients(GateGradientFormat("small"), steps, **{**tensors, name: tensors[name].half()})


def test_addresses_are_taken_nowhere_else():
    """But in a call of a layer, where everything was looked at: see addresses.py."""
    found = {
        path.name: sum(
            isinstance(node, ast.Attribute) and node.attr == "data_ptr"
            for node in ast.walk(ast.parse(path.read_text()))
        )
        for path in FOLDER.rglob("*.py")
    }
    counts = {"addresses.py": 2, "linear_layer.py": 3, "recurrent_layer.py": 8}
    assert {name: count for name, count in found.items() if count} == counts


def test_memory_of_numpy_states_its_dtype():
    for path in FOLDER.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("np.empty", "np.zeros", "np.array", "np.ones"):
                assert len(call.args) > 1 or any(k.arg == "dtype" for k in call.keywords), (path.name, call.lineno)
    assert np.empty(1).dtype == np.float64
