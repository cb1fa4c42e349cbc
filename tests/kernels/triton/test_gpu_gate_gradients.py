"""Gate gradients by the kernels, against the reference in float64; the loop of several programs has other tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from gate_gradient_layers import Layer, assert_close
from gpu_device import DEVICE

from triton_sparse_rnn.gate_gradients import random
from triton_sparse_rnn.gate_gradients.backends import triton as backend
from triton_sparse_rnn.gate_gradients.contract import Needed, Rule
from triton_sparse_rnn.kernels.triton.exchange import INTERPRETED
from triton_sparse_rnn.kernels.triton.gate_gradients.step import BLOCKS, DENSE, ELEMENTS, Zeroing, uniform
from triton_sparse_rnn.kernels.triton.gate_gradients.through_time import LARGEST_BLOCK, BackwardLoop, choose_step_tile

SMALL, SAMPLE = Rule("small"), Rule("sample")
BY_GATE = [0.3, 0.2, 0.6, 0.1]
SIZES = {
    "rectangle": [3, 3, 3],
    "two slices": [17, 17],
    "ragged": [18, 17, 1],
    "one row": [1, 1, 1, 1],
    "one step": [5],
}


@pytest.fixture(autouse=True)
def _exact_and_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def blocks(selection: str, units: int = 16, rows: int = 16) -> Rule:
    return dataclasses.replace(Rule(group="blocks", units=units, rows=rows), selection=selection)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_shapes(sizes: list[int], reverse: bool) -> None:
    rule = blocks("sample") if reverse == (len(sizes) == 3) else SAMPLE
    layer = Layer(13, sizes, reverse=reverse)  # one program holds all units: the loop is one launch
    thresholds = BY_GATE if rule.group == "elements" else [0.5]
    assert_close(layer.run(rule, thresholds), layer.exact(rule, thresholds))


@pytest.mark.parametrize(
    ("H", "rule"), [(1, SMALL), (15, SAMPLE), (16, blocks("small")), (37, SMALL), (37, blocks("small"))]
)
def test_every_remainder_of_a_tile(H: int, rule: Rule) -> None:
    layer = Layer(H, [4, 2], reverse=H == 15)  # with more units than one program has: step by step in an interpreter
    thresholds = BY_GATE if rule.group == "elements" else [0.4]
    assert_close(layer.run(rule, thresholds), layer.exact(rule, thresholds))


@pytest.mark.parametrize(("units", "rows"), [(1, 1), (4, 2), (8, 16), (32, 4), (16, 32)])
def test_sizes_of_blocks(units: int, rows: int) -> None:
    layer, rule, theta = Layer(30, [18, 7]), blocks("sample" if units == 4 else "small", units, rows), 0.3
    exact = layer.exact(rule, [theta])
    assert units * rows > 64 or 0 < exact.zeros[0] < 25 * 30
    assert_close(layer.run(rule, [theta]), exact)


@pytest.mark.parametrize(("sizes", "reverse"), [([3, 3], True), ([17, 16, 1], False)])
@pytest.mark.parametrize("theta", [0.6, 0.0, 1e9])
def test_products_that_skip_blocks(theta: float, reverse: bool, sizes: list[int]) -> None:
    H = 37 if theta == 0.6 else 13
    layer, rule = Layer(H, sizes, I=130, reverse=reverse), blocks("sample")
    assert_close(layer.run(rule, [theta], likely_zeros=1.0), layer.exact(rule, [theta]))


@pytest.mark.parametrize("rule", [SAMPLE, blocks("sample")], ids=lambda rule: rule.group)
def test_no_threshold_and_zero_zero_nothing(rule: Rule) -> None:
    layer = Layer(13, [3, 3, 2])
    exact = layer.exact(rule, None)
    assert exact.zeros.tolist() == [0] * 4
    assert_close(layer.run(rule, None), exact)
    assert_close(layer.run(rule, [0.0] * (4 if rule.group == "elements" else 1)), exact)


@pytest.mark.parametrize("rule", [SMALL, blocks("sample")], ids=lambda rule: rule.group)
def test_nan_and_infinity_are_kept_and_zeros_stay(rule: Rule) -> None:
    layer = Layer(20, [3, 3, 3])
    layer.arriving.y[4, 3], layer.arriving.y[8, 17] = torch.nan, torch.inf
    thresholds = [1e30] * (4 if rule.group == "elements" else 1)
    exact = layer.exact(rule, thresholds)
    assert exact.gates is not None
    assert exact.gates.isnan().any()
    assert_close(layer.run(rule, thresholds), exact)
    layer = Layer(13, [3, 3])
    for gradient in layer.arriving:
        gradient.zero_()  # type: ignore[union-attr]
    assert layer.run(rule, thresholds).zeros.tolist() == [6 * 13] * 4


@pytest.mark.parametrize(("dtype", "rule"), [(torch.float16, SAMPLE), (torch.bfloat16, blocks("sample"))], ids=str)
def test_narrow_dtypes(dtype: torch.dtype, rule: Rule) -> None:
    """Everything but what is decided, since a value near its threshold may fall on either side of it."""
    layer = Layer(20, [3, 2], dtype=dtype)
    tolerance = 40 * torch.finfo(dtype).eps
    exact = layer.exact(rule, None)._replace(zeros=layer.saturated())  # 0.99858 is 1 in bfloat16, to the nearest
    assert_close(layer.run(rule, None), exact, tolerance)
    thresholds = BY_GATE if rule.group == "elements" else [0.6]
    got: Any = layer.run(rule, thresholds, likely_zeros=1.0)
    assert all(tensor.dtype == dtype for tensor in (got.x, got.h0, got.c0, got.weight_ih, got.bias_ih, got.gates))
    assert got.zeros.tolist() == (got.gates == 0).sum((0, 2)).tolist()
    assert (got.zeros - layer.exact(rule, thresholds).zeros).abs().max() <= 16 * 3
    rows, direction = got.gates.flatten(1).double(), layer.direction
    for ours, right in ((got.weight_ih, rows.t() @ direction.x.double()), (got.x, rows @ direction.weight_ih.double())):
        torch.testing.assert_close(ours.double(), right, rtol=tolerance, atol=tolerance)


def test_gradients_that_are_not_needed_are_not_there() -> None:
    layer = Layer(13, [3, 2])
    got: Any = layer.run(SMALL, BY_GATE, needed=Needed(False, False, True, False, False), keep_gates=False)
    assert [name for name, value in got._asdict().items() if value is None] == [
        "x", "weight_ih", "bias_ih", "bias_hh", "weight_hr", "gates",
    ]  # fmt: skip
    torch.testing.assert_close(
        got.weight_hh.double(),
        layer.exact(SMALL, BY_GATE).weight_hh,
        rtol=1e-5,
        atol=1e-5,  # type: ignore[union-attr]
    )


def test_rows_of_gradients_may_lie_anywhere() -> None:
    layer = Layer(13, [3, 3])
    exact = layer.exact(SMALL, BY_GATE)
    wide = torch.full((6, 30), torch.nan, device=DEVICE)
    wide[:, 5:18] = layer.arriving.y
    layer.arriving = layer.arriving._replace(y=wide[:, 5:18])
    assert_close(layer.run(SMALL, BY_GATE), exact)
    layer.arriving = layer.arriving._replace(y=torch.ones(1, 1, device=DEVICE).expand(6, 13))
    assert_close(layer.run(SMALL, BY_GATE), layer.exact(SMALL, BY_GATE))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("sizes", [[64] * 30, [33, 20, 20, 17, 16, 1]], ids=["rectangle", "ragged"])
@pytest.mark.parametrize("rule", [SAMPLE, blocks("sample")], ids=lambda rule: rule.group)
@pytest.mark.parametrize("H", [300, 1024, 2048])
def test_many_programs_side_by_side(H: int, rule: Rule, sizes: list[int]) -> None:
    """What is decided is left out: among so many some are so near to the threshold that rounding decides them.

    And some g are 1 in float32, whose gradients are 0 though nothing was judged.
    """
    layer, thresholds = Layer(H, sizes), BY_GATE if rule.group == "elements" else [0.6]
    kept = layer.run(rule, None)
    assert kept.gates is not None
    assert kept.zeros.tolist() == (kept.gates == 0).sum((0, 2)).tolist()
    assert_close(kept, layer.exact(rule, None)._replace(zeros=kept.zeros), 1e-3)
    got, exact = layer.run(rule, thresholds), layer.exact(rule, thresholds)
    assert got.gates is not None
    assert got.gates.isfinite().all()
    assert (got.zeros - exact.zeros).abs().max() <= 0.02 * sum(sizes) * H
    again = layer.run(rule, thresholds, likely_zeros=1.0)
    assert torch.equal(again.gates, got.gates)  # type: ignore[arg-type]
    torch.testing.assert_close(again.weight_hh, got.weight_hh, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rule", [SAMPLE, blocks("sample")], ids=lambda rule: rule.group)
def test_step_by_step_where_not_all_programs_can_be_resident(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BackwardLoop, "_capacity", lambda *_: 0)
    layer, thresholds = Layer(37, [18, 17, 1]), BY_GATE if rule.group == "elements" else [0.4]
    assert_close(layer.run(rule, thresholds), layer.exact(rule, thresholds))


@triton.jit
def draw(seed_ptr, n_ptr, j_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    seed = tl.load(seed_ptr).to(tl.uint32)
    u = uniform(seed, tl.load(n_ptr + offs).to(tl.uint32), tl.load(j_ptr + offs).to(tl.uint32))
    tl.store(out_ptr + offs, u)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
def test_random_numbers_are_those_of_every_backend(seed: int) -> None:
    seeds = torch.tensor([seed], device=DEVICE)
    n, j = (torch.randint(0, 2**31, (64,), device=DEVICE) for _ in range(2))
    out = torch.full((64,), torch.nan, device=DEVICE)
    launch: Any = draw[(1,)]
    launch(seeds, n, j, out, BLOCK=64)
    assert torch.equal(out, random.uniform(seeds, n, j))


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("group", [DENSE.value, ELEMENTS.value, BLOCKS.value])
def test_tiles_hold_blocks_and_are_resident_where_any_is(group: int, itemsize: int) -> None:
    for H in (1, 100, 256, 1024, 2048, 8192):
        for B in (1, 16, 33, 64, 500):
            for units, rows in ((1, 1), (16, 16), (64, 16), (16, 64)) if group == BLOCKS.value else ((1, 1),):
                tile = choose_step_tile(H, B, Zeroing(group, False, units, rows), itemsize, 132)
                assert tile.rows % rows == tile.units % units == tile.units % tile.chunk == 0
                assert tile.rows * tile.units <= LARGEST_BLOCK
                assert group != BLOCKS.value or tile.rows == max(16, rows)
    assert choose_step_tile(1024, 64, Zeroing(BLOCKS.value, True, 16, 16), 2, 132).units == 32
    assert choose_step_tile(2048, 64, Zeroing(ELEMENTS.value), 2, 132)[:2] == (32, 32)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (blocks("small", 12, 16), "blocks of 12 units x 16 rows are not those it can run"),
        (blocks("small", 128, 1), "blocks of 128 units x 1 rows"),
        (blocks("small", 64, 32), "blocks of 64 units x 32 rows"),
    ],
)
def test_what_is_not_supported_is_said(rule: Rule, words: str) -> None:
    assert words in str(backend.unsupported_reason(Layer(3, [2]).direction, rule))


def test_layers_that_are_not_supported_are_said() -> None:
    direction = Layer(3, [2]).direction
    assert backend.unsupported_reason(direction, SAMPLE) is None
    assert backend.unsupported_reason(direction, blocks("sample", 64, 16)) is None
    for changes, words in (
        ({"mode": "GRU"}, "this is a GRU"),
        ({"weight_hr": torch.zeros(2, 3)}, "proj_size"),
        ({"x": direction.x.double()}, "float64"),
    ):
        assert words in str(backend.unsupported_reason(direction._replace(**changes), SMALL))
