import dataclasses
import subprocess
import sys

import pytest
import torch

from triton_sparse_rnn.kernels.cpu.support import availability, unsupported_reason
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix


def matrix(block_size=(16, 1), dtype=torch.float32):
    return BlockMatrix.from_dense(torch.ones(48, 16, dtype=dtype), block_size, gates=3)


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


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 32])
def test_supported(rows):
    assert unsupported_reason(matrix((rows, 3)), matrix((rows, 40))) is None


@pytest.mark.parametrize(
    ("weight_ih", "weight_hh", "reason"),
    [
        (matrix((3, 1)), matrix((3, 1)), "the blocks have 3 rows"),
        (matrix((8, 1)), matrix((16, 1)), "weight_ih has blocks of 8 rows and weight_hh of 16"),
        (matrix(dtype=torch.float64), matrix(), "weight_ih is stored as torch.float64"),
        (matrix(), BlockMatrix.from_dense(torch.ones(48, 16), (16, 1), dtype=torch.int8), "stored as torch.int8"),
        (matrix(), dataclasses.replace(matrix(), values=matrix().values.to("meta")), "weight_hh is on meta"),
    ],
)
def test_unsupported(weight_ih, weight_hh, reason):
    assert reason in (unsupported_reason(weight_ih, weight_hh) or "")
