import dataclasses
import subprocess
import sys

import pytest
import torch

from triton_sparse_rnn.kernels.cpu.support import MOST_COLUMNS, availability, unreadable_reason
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix


def matrix(block_size=(16, 1), dtype=torch.float32, columns=16):
    return BlockMatrix.from_dense(torch.ones(48, columns), block_size, gates=3, dtype=dtype)


def test_available_here():
    assert availability() is None


def test_missing_numba_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    assert "numba cannot be imported" in (availability.__wrapped__() or "")


def test_disabled_compilation_is_said(monkeypatch):
    monkeypatch.setattr("numba.config.DISABLE_JIT", 1)
    assert "NUMBA_DISABLE_JIT" in (availability.__wrapped__() or "")


def test_numba_is_not_imported_to_ask():
    code = "import sys, triton_sparse_rnn.kernels.cpu.support; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("rows", [1, 3, 8, 16, 32, 47, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_any_block_and_dtype(rows, dtype):
    for columns in (1, 3, 40):
        assert unreadable_reason("weight_hh", matrix((rows, columns), dtype), quantized=False) is None


def test_dense_weight():
    assert unreadable_reason("weight_ih", torch.ones(48, 16), quantized=False) is None


def test_quantised_activations():
    assert unreadable_reason("weight_hh", matrix(dtype=torch.int8, columns=MOST_COLUMNS), quantized=True) is None


@pytest.mark.parametrize(
    ("weight", "quantized", "reason"),
    [
        (matrix(dtype=torch.float64), False, "weight_hh is stored as torch.float64, and only torch.float32, "),
        (
            dataclasses.replace(matrix(), values=matrix().values.to("meta")),
            False,
            "weight_hh is on meta, not on the CPU",
        ),
        (torch.ones(48, 16, device="meta"), False, "weight_hh is on meta"),
        (matrix(), True, "weight_hh is stored as torch.float32, and quantised activations need torch.int8"),
        (matrix(dtype=torch.int8, columns=MOST_COLUMNS + 1), True, "weight_hh has 65537 columns"),
    ],
)
def test_unsupported(weight, quantized, reason):
    assert reason in (unreadable_reason("weight_hh", weight, quantized=quantized) or "")
