"""Other gates than those of forward, and products of gate gradients; tests/gate_gradients has them together."""

import math
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
from rounding import assert_exact_product
from torch import Tensor

from triton_sparse_rnn.kernels.cpu import threads
from triton_sparse_rnn.kernels.cpu.compilation import kernel_address, kernel_function
from triton_sparse_rnn.kernels.cpu.gate_gradients import dense_products
from triton_sparse_rnn.kernels.cpu.gate_gradients import products as gate_products
from triton_sparse_rnn.kernels.cpu.gate_gradients.dense_products import multiply_dense, prepare_product
from triton_sparse_rnn.kernels.cpu.gate_gradients.products import DenseProducts, SkippingProducts
from triton_sparse_rnn.kernels.cpu.gate_gradients.sparse_products import PanelFormat
from triton_sparse_rnn.kernels.cpu.gate_gradients.states import CellFormat
from triton_sparse_rnn.kernels.cpu.gate_gradients.through_time import lstm_cells, place_steps

H = 37  # two vectors, and five units one by one
RAGGED = (5, 5, 3, 1)


def random_gates(*shape: int) -> Tensor:
    """i, f, g, o of units in the last axis."""
    i, f, g, o = torch.randn(4, *shape).unbind()
    return torch.stack([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], dim=-2)


def forged(name: str, gates: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    gates, y = gates.clone(), y.clone()
    if name == "i and g exchanged":
        gates = gates[:, [2, 1, 0, 3]]
    elif name == "f and o exchanged":
        gates = gates[:, [0, 3, 2, 1]]
    elif name == "steps in another order":
        gates = gates.flip(0)
    elif name == "a unit of y":
        y[-1, -1] += 1e-3
    elif name == "NaN in y":
        y[0, 0] = math.nan
    else:
        gates[3, 2, 5] = math.nan
    return gates.flatten(1), y


@pytest.mark.parametrize(
    "name",
    ["i and g exchanged", "f and o exchanged", "steps in another order", "a unit of y", "NaN in y", "NaN in a gate"],
)
def test_other_gates_are_found_out(name):
    gates, c0 = random_gates(12, H), torch.randn(4, H)
    steps = place_steps((4, 4, 4), reverse=False, gates_as_taken=False)
    c, _ = lstm_cells(steps, gates.flatten(1), c0, torch.zeros(12, H))
    y = gates[:, 3] * c.tanh()
    assert lstm_cells(steps, gates.flatten(1), c0, y)[1]
    other_gates, other_y = forged(name, gates, y)
    assert not lstm_cells(steps, other_gates, c0, other_y)[1]


@pytest.mark.parametrize("rows", [1, 3, 300])
@pytest.mark.parametrize("operators", ["as they are", "missing"])
def test_dense_products(rows, operators, monkeypatch):
    if operators == "missing":
        monkeypatch.setattr(dense_products, "_operators", lambda: None)
    for matrix in (torch.randn(28, 7), torch.randn(7, 28).t(), torch.randn(28, 9)[:, 1:8], torch.randn(28, 0)):
        inputs = torch.randn(rows, 30)[:, :28]
        for product in (multiply_dense(inputs, matrix), prepare_product(matrix, rows, 300)(inputs)):
            assert_exact_product(product, inputs, matrix)


@pytest.mark.parametrize("name", ["_linear_pointwise", "_reorder_linear_weight"])
def test_operators_that_are_gone_or_do_something_else_are_not_used(name, monkeypatch):
    class Others:
        _linear_pointwise = staticmethod(lambda *arguments: torch.zeros(2, 4))
        _reorder_linear_weight = staticmethod(lambda *arguments: None)

    operators = dense_products._operators.__wrapped__
    monkeypatch.setattr(torch.ops, "mkldnn", Others, raising=False)
    assert operators() is None
    monkeypatch.delattr(Others, name)
    assert operators() is None


def test_products_are_the_same_by_every_way():
    gates = torch.randn(23, 12) * (torch.rand(23, 12) < 0.3)
    matrix, inputs = torch.randn(12, 8)[:, :5], [torch.randn(23, 9)[:, 1:6], torch.randn(23, 70)]
    for products in (DenseProducts(gates, keeps_shape=True), SkippingProducts(gates)):
        assert_exact_product(products.times(matrix), gates, matrix)
        for product, each in zip(products.transposed_times(*inputs), inputs, strict=True):
            assert_exact_product(product, gates.t(), each)
        assert products.transposed_times() == []
    none = SkippingProducts(torch.zeros(23, 12))
    assert torch.equal(none.times(matrix), torch.zeros(23, 5))
    assert torch.equal(none.transposed_times(inputs[0])[0], torch.zeros(12, 5))


@pytest.mark.parametrize(("N", "columns"), [(0, 12), (1, 4), (23, 12), (300, 260), (2065, 36)])
def test_products_have_the_same_bits_with_any_number_of_threads(N, columns, monkeypatch):
    monkeypatch.setattr(gate_products, "_THREAD_TERMS", 1)
    monkeypatch.setattr(Tensor, "new_empty", lambda like, *shape: like.new_full(shape, math.nan))
    gates = torch.randn(N, columns + 3)[:, :columns] * (torch.rand(N, columns) < 0.3)
    gates[:1, 2] = math.nan
    matrix, inputs = torch.randn(columns, 70), [torch.randn(N, 9)[:, 1:6], torch.randn(N, 130)]

    def results(num_threads: int) -> list[Tensor]:
        products = SkippingProducts(gates, num_threads)
        return [products.times(matrix), *products.transposed_times(*inputs)]

    one = results(1)
    assert [each.isnan().sum() for each in one] == ([70, 5, 130] if N > 0 else [0] * 3)
    for num_threads in (2, 3, 8, 64):
        for ours, expected in zip(results(num_threads), one, strict=True):
            assert torch.equal(ours.view(torch.int32), expected.view(torch.int32))  # NaN too


def test_large_products_are_shared(monkeypatch):
    submitted = []

    class NobodyComes:
        def submit(self, *arguments: object) -> Future:
            submitted.append(arguments)
            return Future()

    monkeypatch.setattr(threads, "_pool", NobodyComes)
    gates, matrix, inputs = torch.randn(64, 32), torch.randn(32, 512), torch.randn(64, 512)
    for terms, helpers in ((1 << 21, 0), (1 << 20, 0), (1 << 19, 1), (1 << 18, 3), (1, 3)):
        monkeypatch.setattr(gate_products, "_THREAD_TERMS", terms)
        products = SkippingProducts(gates, 4)
        assert products.threads_for(512) == helpers + 1
        product = products.times(matrix)
        assert len(submitted) == 2 * helpers  # for the panels and for the parts
        assert_exact_product(product, gates, matrix)
        submitted.clear()
        SkippingProducts(gates, 2).transposed_times(inputs)
        assert len(submitted) == 2 * min(helpers, 1)
        submitted.clear()


def test_products_in_several_threads_of_python(monkeypatch):
    monkeypatch.setattr(gate_products, "_THREAD_TERMS", 1)
    gates = [torch.randn(200, 36) * (torch.rand(200, 36) < 0.3) for _ in range(6)]
    matrix = torch.randn(36, 130)

    def work(own: Tensor) -> list[Tensor]:
        return [SkippingProducts(own, 3).times(matrix) for _ in range(10)]

    with ThreadPoolExecutor(6) as callers:
        runs = list(callers.map(work, gates, timeout=60))
    for own, run in zip(gates, runs, strict=True):
        expected = SkippingProducts(own).times(matrix)
        assert all(torch.equal(each, expected) for each in run)


def test_formats_with_equal_fields_are_kernels_of_their_own():
    assert kernel_address(CellFormat()) != kernel_address(PanelFormat())
    assert kernel_function(CellFormat()) is not kernel_function(PanelFormat())
