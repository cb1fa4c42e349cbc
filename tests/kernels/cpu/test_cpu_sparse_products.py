"""Products without zeros, both ways, against float64 within the rounding of a sum of as many terms."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
import torch
from emitted_code import call_kernel
from llvmlite import ir
from rounding import assert_exact_product

from triton_sparse_rnn.kernels.cpu import target
from triton_sparse_rnn.kernels.cpu.gate_gradients.sparse_products import (
    PANEL_COLUMNS,
    FactorFields,
    PanelFields,
    PanelFormat,
    SparseProductFields,
    SparseProductFormat,
    emit_panels,
    emit_sparse_product,
    lay_out_scratch,
    panels_bytes,
)

ROOM = 3  # floats between rows
GUARD_BYTES = 64  # behind scratch and panels, which must stay as they are
GUARD = 77
SIZES = [  # N, K, M
    (1, 1, 1),
    (1, 130, 7),
    (3, 28, 16),
    (3, 100, 129),
    (15, 17, 64),
    (17, 47, 65),
    (32, 256, 63),
    (33, 129, 192),
    (127, 16, 5),
    (128, 128, 1),
    (129, 33, 16),
    (300, 260, 70),
    (2065, 34, 9),
]


def sparse(N, K, zeros):
    """[N, K] with ROOM between rows, of which about that share is 0, and some of it -0."""
    D = torch.full((N, K + ROOM), math.nan)[:, :K].copy_(torch.randn(N, K))
    D[torch.rand(N, K) < zeros] = 0.0
    D[torch.rand(N, K) < zeros / 4] = -0.0
    return D


def spaced(rows, columns):
    return torch.full((rows, columns + ROOM), math.nan)[:, :columns].copy_(torch.randn(rows, columns))


class Memory:
    """So many bytes from a cache line on, filled as new memory is not, and a guard behind them."""

    def __init__(self, size):
        self.bytes = torch.full((size + GUARD_BYTES + 64,), 255, dtype=torch.uint8)  # NaN, as floats
        self.address = -(-self.bytes.data_ptr() // 64) * 64
        end = self.address - self.bytes.data_ptr() + size
        self.guard = self.bytes[end : end + GUARD_BYTES].fill_(GUARD)

    def assert_kept_within(self):
        assert (self.guard == GUARD).all()


def panels_of(*pieces):
    """The panels of a matrix that comes in several pieces of its rows, and what one occupies."""
    rows, columns = sum(map(len, pieces)), pieces[0].shape[1]
    memory, panel_bytes, first = Memory(panels_bytes(rows, columns)), panels_bytes(rows, 1), 0
    for piece in pieces:
        place = memory.address + panels_bytes(first, 1)
        fields = PanelFields(piece.data_ptr(), 4 * piece.stride(0), len(piece), columns, place, panel_bytes)
        call_kernel(PanelFormat(), fields, 0, -(-columns // PANEL_COLUMNS))
        first += len(piece)
    memory.assert_kept_within()
    return memory, panel_bytes


def multiply(D, factor, *, by_columns, first=0, end=None):
    """The product of D, or of some of its rows, with a matrix or pieces of one. NaN stays elsewhere."""
    return multiply_all(D, [factor], by_columns, first, end)[0]


def multiply_all(D, factors, by_columns, first=0, end=None):
    """The same with several factors, in one call."""
    N, K = D.shape
    end = N if end is None else end
    words, outputs, kept = [], [], []
    for factor in factors:
        pieces = factor if isinstance(factor, tuple) else (factor,)
        memory, panel_bytes = panels_of(*pieces)
        M = pieces[0].shape[1]
        output = torch.full((K if by_columns else N, M + ROOM), math.nan)
        words += FactorFields(memory.address, panel_bytes, M, output.data_ptr(), 4 * output.stride(0))
        outputs.append(output)
        kept.append(memory)
    offsets, size = lay_out_scratch(by_columns, end - first, K)
    scratch, factor_words = Memory(size), np.array(words, dtype=np.int64)
    starts, values, places, sums = (scratch.address + offset for offset in offsets)
    fields = SparseProductFields(
        D.data_ptr(), 4 * D.stride(0), K, starts, values, places, sums, factor_words.ctypes.data, len(factors)
    )
    call_kernel(SparseProductFormat(by_columns), fields, first, end)
    for memory in (*kept, scratch):
        memory.assert_kept_within()
    for output in outputs:
        assert output[:, output.shape[1] - ROOM :].isnan().all()
    return [output[:, : output.shape[1] - ROOM] for output in outputs]


@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_by_rows(size, zeros):
    N, K, M = size
    D, X = sparse(N, K, zeros), spaced(K, M)
    assert_exact_product(multiply(D, X, by_columns=False), D, X)


@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_by_columns(size, zeros):
    N, K, M = size
    D, X = sparse(N, K, zeros), spaced(N, M)
    assert_exact_product(multiply(D, X, by_columns=True), D.t(), X)


def test_rows_of_very_different_lengths():
    D = sparse(40, 300, 0.9)
    D[::3] = 0
    D[1::3] = torch.randn(13, 300)
    W, X = spaced(300, 80), spaced(40, 80)
    assert_exact_product(multiply(D, W, by_columns=False), D, W)
    assert_exact_product(multiply(D, X, by_columns=True), D.t(), X)


def test_several_factors_in_one_call():
    D = sparse(37, 52, 0.8)
    factors = [spaced(52, 13), spaced(52, 130)]
    for product, X in zip(multiply_all(D, factors, by_columns=False), factors, strict=True):
        assert torch.equal(product, multiply(D, X, by_columns=False))
    factors = [spaced(37, 13), spaced(37, 130)]
    for product, X in zip(multiply_all(D, factors, by_columns=True), factors, strict=True):
        assert torch.equal(product, multiply(D, X, by_columns=True))


def test_a_factor_in_pieces():
    D, X = sparse(37, 52, 0.8), spaced(37, 70)
    whole = multiply(D, X, by_columns=True)
    assert torch.equal(multiply(D, (X[:5], X[5:6].clone(), X[6:]), by_columns=True), whole)


def test_some_of_the_rows():
    D, W, X = sparse(300, 140, 0.8), spaced(140, 70), spaced(300, 70)
    some = multiply(D, W, by_columns=False, first=11, end=240)
    assert some[:11].isnan().all()
    assert some[240:].isnan().all()
    assert_exact_product(some[11:240], D[11:240], W)
    some = multiply(D, X, by_columns=True, first=11, end=240)
    assert_exact_product(some, D[11:240].t(), X[11:240])


def test_no_rows():
    D, X = sparse(3, 20, 0.5), spaced(3, 9)
    assert multiply(D, X, by_columns=False, first=2, end=2).isnan().all()
    assert torch.equal(multiply(D, X, by_columns=True, first=2, end=2), torch.zeros(20, 9))


def test_a_sum_does_not_depend_on_the_others():
    D, W, X = sparse(150, 140, 0.7), spaced(140, 70), spaced(150, 70)
    by_rows, by_columns = multiply(D, W, by_columns=False), multiply(D, X, by_columns=True)
    for n in (0, 1, 77, 149):
        assert torch.equal(multiply(D[n : n + 1], W, by_columns=False), by_rows[n : n + 1])
    for k in (0, 15, 16, 139):  # addresses of another alignment, and the loop over single columns
        assert torch.equal(multiply(D[:, k : k + 1], X, by_columns=True), by_columns[k : k + 1])
    for m in (0, 33, 69):
        assert torch.equal(multiply(D, W[:, m:], by_columns=False), by_rows[:, m:])
        assert torch.equal(multiply(D, X[:, m:], by_columns=True), by_columns[:, m:])


@pytest.mark.parametrize("by_columns", [False, True])
def test_nan_and_infinity_travel(by_columns):
    D, X = sparse(40, 150, 0.8), spaced(40 if by_columns else 150, 21)
    D[3, 7], D[38, 148], D[5, 149], D[39, 20] = math.nan, math.nan, math.inf, -math.inf
    left = D.t() if by_columns else D
    product, expected = multiply(D, X, by_columns=by_columns), left @ X
    assert torch.equal(product.isnan(), expected.isnan())
    assert torch.equal(product.isposinf(), expected.isposinf())
    assert torch.equal(product.isneginf(), expected.isneginf())
    rows = [7, 148, 149, 20] if by_columns else [3, 38, 5, 39]
    assert not product[rows].isfinite().any()


@pytest.mark.parametrize("by_columns", [False, True])
def test_what_meets_zero_is_left_out(by_columns):
    """Of a row of X that only 0 and -0 meet, not even NaN is seen."""
    D, X = sparse(40, 150, 0.8), spaced(40 if by_columns else 150, 21)
    left = D.t() if by_columns else D
    left[:, 9], left[::2, 9], X[9] = 0.0, -0.0, math.nan
    product = multiply(D, X, by_columns=by_columns)
    X[9] = 0.0
    assert_exact_product(product, left, X)


def test_small_numbers_are_not_zeros():
    D = torch.tensor([[1e-45, 0.0, -1e-38]])
    X = torch.tensor([[2.0**100], [1.0], [2.0**100]])
    assert_exact_product(multiply(D, X, by_columns=False), D, X)


PROGRAM = """
import torch
import test_cpu_sparse_products as tests
from triton_sparse_rnn.kernels.cpu import target
torch.manual_seed(0)
for size in tests.SIZES:
    tests.test_by_rows(size, 0.7)
    tests.test_by_columns(size, 0.7)
tests.test_nan_and_infinity_travel(False)
tests.test_nan_and_infinity_travel(True)
print(target.vector_path())
"""
AVX2 = ["avx", "avx2", "fma", "f16c", "bmi", "bmi2", "popcnt", "sse4.2"]
PATHS = {"AVX2": ("haswell", AVX2), "generic": ("generic", [])}  # name of the processor and its features


def test_other_vector_paths(tmp_path):
    """Those that this processor has, at once."""
    if not llvm.get_process_triple().startswith("x86_64"):
        pytest.skip("this processor has no other paths")
    here, programs = llvm.get_host_cpu_features(), {}
    for path, (cpu, features) in PATHS.items():
        if not all(here.get(feature) for feature in features):
            continue
        environment = os.environ | {
            "NUMBA_CPU_NAME": cpu,
            "NUMBA_CPU_FEATURES": ",".join(f"+{feature}" for feature in features),
            "NUMBA_CACHE_DIR": str(tmp_path / path),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        programs[path] = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            cwd=Path(__file__).parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    for path, program in programs.items():
        printed, errors = program.communicate(timeout=200)
        assert printed.strip() == path, errors


@pytest.mark.parametrize("kernel", ["panels", "by rows", "by columns"])
def test_nothing_of_x86_is_asked_for_elsewhere(monkeypatch, kernel):
    monkeypatch.setattr(target, "features", lambda: frozenset({"neon"}))
    module = ir.Module()
    module.triple = "aarch64-unknown-linux-gnu"
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 3), "kernel")
    builder: Any = ir.IRBuilder(function.append_basic_block())
    if kernel == "panels":
        emit_panels(builder, PanelFormat(), *function.args)
    else:
        emit_sparse_product(builder, SparseProductFormat(kernel == "by columns"), *function.args)
    builder.ret_void()
    assert "x86" not in str(module)
    llvm.parse_assembly(str(module)).verify()
