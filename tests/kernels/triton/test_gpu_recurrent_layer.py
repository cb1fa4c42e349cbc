"""Whole layers, as one launch where a program holds them and step by step where the interpreter cannot exchange."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from gpu_device import DEVICE
from gpu_layers import assert_close, in_columns_of_16, random_matrix
from torch import Tensor

from triton_sparse_rnn.kernels.triton import tiles, time_loop
from triton_sparse_rnn.kernels.triton.exchange import INTERPRETED
from triton_sparse_rnn.kernels.triton.recurrent_layer import (
    RecurrentLayer,
    RecurrentStack,
    can_be_stacked,
    refuse_first_in_capture,
)
from triton_sparse_rnn.ops.backends.reference import recurrent_layer
from triton_sparse_rnn.ops.layer_weights import LayerWeights
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.layer_config import GATES
from triton_sparse_rnn.sparse.picks import Picks

MODES = ("RNN_TANH", "RNN_RELU", "GRU", "LSTM")
RAGGED = (4, 3, 1)


def random_directions(
    mode: str,
    I: int,
    H: int,
    *,
    D: int = 1,
    pattern: tuple[int, int] | Picks = (16, 1),
    density: float = 0.4,
    dense_input: bool = False,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
) -> list[LayerWeights]:
    G = GATES[mode]

    def vector() -> Tensor | None:
        return torch.randn(G * H, device=DEVICE) / 2 if bias else None

    return [
        LayerWeights(
            torch.randn(G * H, I, device=DEVICE) / I**0.5
            if dense_input
            else random_matrix(G, H, I, pattern, density, dtype),
            random_matrix(G, H, H, pattern, density, dtype),
            vector(),
            vector(),
        )
        for _ in range(D)
    ]


def random_call(
    mode: str, I: int, H: int, layers: int, batch_sizes: Sequence[int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[Tensor], Tensor]:
    states = [torch.randn(layers, batch_sizes[0], H).to(DEVICE, dtype) for _ in range(2 if mode == "LSTM" else 1)]
    return torch.randn(sum(batch_sizes), I).to(DEVICE, dtype), states, torch.tensor(batch_sizes)


def expected(mode: str, directions: list[LayerWeights], x: Tensor, states: list[Tensor], sizes: Tensor) -> list[Tensor]:
    """By the reference in float64, each column of 16 read where one of its weights is stored."""
    weights = [
        LayerWeights(ih if isinstance(ih, Tensor) else in_columns_of_16(ih), in_columns_of_16(hh), bias_ih, bias_hh)
        for ih, hh, bias_ih, bias_hh, _ in directions
    ]
    return recurrent_layer(x.double(), [state.double() for state in states], weights, sizes, mode)


@pytest.fixture(params=["alone", "many", "streamed"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One program holds the layer; many do, a step a launch if they are interpreted; or weights are streamed."""
    if request.param == "streamed":
        monkeypatch.setattr(time_loop, "choose_residency", lambda *arguments, **options: None)
    elif request.param == "many":
        choose = time_loop.choose_residency
        monkeypatch.setattr(
            time_loop, "choose_residency", lambda *a, **options: choose(*a, **{**options, "chains_wait": True})
        )
    return request.param


@pytest.mark.parametrize("pattern", [(16, 1), Picks()], ids=["blocks", "picks"])
@pytest.mark.parametrize("mode", MODES)
def test_cells_in_both_directions_of_a_ragged_batch(way: str, mode: str, pattern: tuple[int, int] | Picks):
    torch.manual_seed(0)
    directions = random_directions(mode, 5, 20, D=2, pattern=pattern)
    x, states, sizes = random_call(mode, 5, 20, 2, RAGGED)
    layer = RecurrentLayer(mode, directions, device=DEVICE)
    assert_close(layer(x, states, sizes), expected(mode, directions, x, states, sizes))
    interpreted = "step by step: " if INTERPRETED else "on chip: "
    begins = {"alone": "on chip: ", "many": interpreted, "streamed": interpreted.replace("on chip", "streamed")}
    assert layer.describe(4).startswith(begins[way])
    assert ("read at every step" in layer.describe(4)) == (way == "streamed")
    assert (", picks" in layer.describe(4)) == (way != "streamed" and pattern == Picks())


@pytest.mark.parametrize(
    ("H", "pattern", "batch_sizes"),
    [
        (16, (16, 1), (1, 1)),
        (1, (1, 1), (2, 2, 2)),
        (18, (4, 2), (3, 3)),
        (33, (32, 3), (1, 1, 1)),
        (20, (1, 1), (5, 5)),
        (48, (16, 4), (2, 1)),
        (7, (16, 16), (9,)),
        (20, (16, 1), (2,)),  # with those above, every tile of streamed.py
        (20, (16, 1), (17,)),
        (1, Picks(), (2, 2)),
        (33, Picks(bank=8, columns=2), (1, 1, 1)),
        (50, Picks(rows=8, bank=16), (3, 3)),
        (70, Picks(rows=32, bank=64, columns=4), (5, 5)),
        (20, Picks(rows=5), (9,)),
        (20, Picks(), (2,)),
        (40, Picks(), (17, 17)),
    ],
)
def test_sizes_and_patterns(way: str, H: int, pattern: tuple[int, int] | Picks, batch_sizes: tuple[int, ...]):
    torch.manual_seed(0)
    directions = random_directions("GRU", 3, H, pattern=pattern)
    x, states, sizes = random_call("GRU", 3, H, 1, batch_sizes)
    layer = RecurrentLayer("GRU", directions, device=DEVICE)
    rectangle = batch_sizes[0] == batch_sizes[-1]
    results = layer(x, states, None if rectangle else sizes)
    assert_close(results, expected("GRU", directions, x, states, sizes))


@pytest.mark.parametrize("pattern", [(16, 1), Picks()], ids=["blocks", "picks"])
@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize(("mode", "H"), [("RNN_TANH", 150), ("GRU", 24)])
def test_no_weights_and_all_weights(way: str, mode: str, H: int, density: float, pattern: tuple[int, int] | Picks):
    """150 columns are more than a program reads at a time."""
    torch.manual_seed(0)
    directions = random_directions(mode, 4, H, density=density, pattern=pattern)
    x, states, sizes = random_call(mode, 4, H, 1, (2, 2, 2))
    results = RecurrentLayer(mode, directions, device=DEVICE)(x, states, None)
    assert_close(results, expected(mode, directions, x, states, sizes))


@pytest.mark.parametrize(("bias", "dense_input"), [(False, False), (True, True), (False, True)])
@pytest.mark.parametrize("mode", ["RNN_RELU", "GRU", "LSTM"])
def test_without_bias_and_with_a_dense_input_weight(mode: str, bias: bool, dense_input: bool):
    torch.manual_seed(0)
    directions = random_directions(mode, 5, 20, D=2, bias=bias, dense_input=dense_input)
    x, states, sizes = random_call(mode, 5, 20, 2, (2, 2, 1))
    results = RecurrentLayer(mode, directions, device=DEVICE)(x, states, sizes)
    assert_close(results, expected(mode, directions, x, states, sizes))


def test_one_direction_with_a_dense_input_weight():
    torch.manual_seed(0)
    directions = [*random_directions("RNN_RELU", 5, 20, dense_input=True), *random_directions("RNN_RELU", 5, 20)]
    x, states, sizes = random_call("RNN_RELU", 5, 20, 2, (1, 1))
    x[0, 2] = float("inf")  # which a pruned block of the other direction does not read
    exact = expected("RNN_RELU", directions, x, states, sizes)
    assert not exact[0][0, 20:].isnan().all()
    assert_close(RecurrentLayer("RNN_RELU", directions, device=DEVICE)(x, states, None), exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_dense_input_weight_makes_sums_in_float32(dtype: torch.dtype):
    torch.manual_seed(0)
    (direction,) = random_directions("RNN_RELU", 5, 20, dense_input=True, dtype=dtype)
    direction = direction._replace(weight_ih=torch.full((20, 5), 2.0, dtype=dtype, device=DEVICE))
    direction.weight_ih[:, 1] = -2.0  # type: ignore[index]
    x, states, sizes = random_call("RNN_RELU", 5, 20, 1, (1, 1), dtype)
    x[:, 0], x[:, 1] = 60000.0, 60000.0  # beyond float16 before they cancel
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        results = RecurrentLayer("RNN_RELU", [direction], device=DEVICE)(x, states, None)
    exact = expected("RNN_RELU", [direction], x, states, sizes)
    # Terms of 120,000 cancel, beside which a sum in float32, or of a tensor core, has units of 2^-7.
    assert_close(results, [right.to(dtype).double() for right in exact], 0.02 if INTERPRETED else 0.05)


@pytest.mark.parametrize("pattern", [(16, 1), Picks()], ids=["blocks", "picks"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_are_read_as_they_are(way: str, dtype: torch.dtype, pattern: tuple[int, int] | Picks):
    torch.manual_seed(0)
    directions = random_directions("LSTM", 5, 20, dtype=dtype, pattern=pattern)
    x, states, sizes = random_call("LSTM", 5, 20, 1, RAGGED)
    results = RecurrentLayer("LSTM", directions, device=DEVICE)(x, states, sizes)
    assert_close(results, expected("LSTM", directions, x, states, sizes))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_inputs_and_outputs(dtype: torch.dtype):
    torch.manual_seed(0)
    directions = random_directions("GRU", 5, 20, dtype=dtype)
    x, states, sizes = random_call("GRU", 5, 20, 1, (2, 2), dtype)
    results = RecurrentLayer("GRU", directions, device=DEVICE)(x, states, None)
    assert {result.dtype for result in results} == {dtype}
    exact = expected("GRU", directions, x, states, sizes)
    assert_close(results, [right.to(dtype).double() for right in exact], torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["GRU", "LSTM"])
def test_gates_that_share_their_columns(mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    tied = tuple(tile for tile in tiles.TABLE if tile.tied)
    monkeypatch.setattr(tiles, "TABLE", tied)
    G, H = GATES[mode], 20
    mask = (torch.rand(3, 1, H) < 0.3).expand(3, 16, H).reshape(48, H)[:H].repeat(G, 1)
    weight = (torch.randn(G * H, H) * mask / 3).to(DEVICE)
    matrix = BlockMatrix.from_dense(weight, (16, 1), gates=G, dtype=dtype)
    directions = [direction._replace(weight_hh=matrix) for direction in random_directions(mode, 5, H, dtype=dtype)]
    x, states, sizes = random_call(mode, 5, H, 1, (2, 2))
    layer = RecurrentLayer(mode, directions, device=DEVICE)
    assert "tied" in layer.describe(2)
    assert_close(layer(x, states, None), expected(mode, directions, x, states, sizes))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("pattern", [(16, 1), (4, 1), Picks()])
def test_what_is_not_finite_travels_along_stored_weights_only(way: str, value: float, pattern: tuple[int, int] | Picks):
    torch.manual_seed(0)
    directions = random_directions("RNN_TANH", 4, 36, pattern=pattern, density=0.15)
    x, states, sizes = random_call("RNN_TANH", 4, 36, 1, (2, 2, 2))
    x[0, 1] = value
    states[0][0, 1, 7] = value
    results = RecurrentLayer("RNN_TANH", directions, device=DEVICE)(x, states, None)
    exact = expected("RNN_TANH", directions, x, states, sizes)
    assert exact[0].isnan().any() or value == float("inf") or value == -float("inf")
    assert exact[0][:2].isfinite().any()
    assert_close(results, exact)


def test_h0_may_hold_the_bits_of_the_sentinel():
    directions = random_directions("RNN_TANH", 4, 20)
    x, states, _ = random_call("RNN_TANH", 4, 20, 1, (1, 1))
    states[0].view(torch.int32)[0, 0, 3] = -1
    y, _ = RecurrentLayer("RNN_TANH", directions, device=DEVICE)(x, states, None)
    assert y.isnan().any()


@pytest.mark.parametrize("patterns", [[(16, 1), (16, 1)], [Picks(), Picks()], [Picks(), (16, 1)]])
@pytest.mark.parametrize("mode", MODES)
def test_a_step_is_one_launch_and_the_same_as_a_call(
    way: str, mode: str, patterns: list[tuple[int, int] | Picks], monkeypatch: pytest.MonkeyPatch
):
    """Also of a layer with one weight in picks."""
    torch.manual_seed(0)
    inputs, recurrent = (random_directions(mode, 6, 20, D=2, pattern=pattern) for pattern in patterns)
    directions = [own._replace(weight_ih=ih.weight_ih) for own, ih in zip(recurrent, inputs, strict=True)]
    x, states, sizes = random_call(mode, 6, 20, 2, (3,))
    layer = RecurrentLayer(mode, directions, device=DEVICE)
    monkeypatch.setattr(layer, "project", None)  # which would be another one
    assert_close(layer(x, states, None), expected(mode, directions, x, states, sizes))


def test_states_and_inputs_are_not_written_to(way: str):
    directions = random_directions("LSTM", 4, 20)
    x, states, sizes = random_call("LSTM", 4, 20, 1, (2, 2))
    for steps in (1, 2):
        tensors = [x[: 2 * steps], *states]
        before = [tensor.clone() for tensor in tensors]
        RecurrentLayer("LSTM", directions, device=DEVICE)(tensors[0], states, sizes[:steps])
        assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize("steps", [1, 2])
def test_a_long_sequence_takes_several_launches(way: str, steps: int, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    directions = random_directions("LSTM", 4, 20, D=2)
    x, states, sizes = random_call("LSTM", 4, 20, 2, (2, 2, 1))
    layer = RecurrentLayer("LSTM", directions, device=DEVICE)
    whole = layer(x, states, sizes)
    monkeypatch.setattr(time_loop, "_EXCHANGE_BYTES", (steps + 1) * 2 * 21 * 2 * 4)
    assert all(itertools.starmap(torch.equal, zip(layer(x, states, sizes), whole, strict=True)))


def test_directions_of_different_patterns():
    torch.manual_seed(0)
    directions = [*random_directions("GRU", 5, 40, pattern=Picks()), *random_directions("GRU", 5, 40)]
    x, states, sizes = random_call("GRU", 5, 40, 2, RAGGED)
    results = RecurrentLayer("GRU", directions, device=DEVICE)(x, states, sizes)
    assert_close(results, expected("GRU", directions, x, states, sizes))


def test_an_empty_batch():
    layer = RecurrentLayer("GRU", random_directions("GRU", 4, 20), device=DEVICE)
    y, h_n = layer(torch.empty(0, 4, device=DEVICE), [torch.empty(1, 0, 20, device=DEVICE)], None)
    assert (y.shape, h_n.shape) == ((0, 20), (1, 0, 20))


def test_a_wait_that_failed_is_told_once():
    directions = random_directions("GRU", 4, 20)
    layer = RecurrentLayer("GRU", directions, device=DEVICE)
    x, states, sizes = random_call("GRU", 4, 20, 1, (1, 1))
    layer.time_loop.status[0] = 1
    with pytest.raises(RuntimeError, match="an earlier call of this layer gave up"):
        layer(x, states, None)
    assert_close(layer(x, states, None), expected("GRU", directions, x, states, sizes))


def test_the_first_call_of_a_shape_cannot_be_captured(monkeypatch: pytest.MonkeyPatch):
    shapes: set[object] = set()
    x, h = torch.zeros(4, 3), [torch.zeros(1, 2, 5)]
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"not been called with x \(4, 3\) before, .* before the capture"):
            refuse_first_in_capture(shapes, x, h, None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    refuse_first_in_capture(shapes, x, h, None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    refuse_first_in_capture(shapes, x, h, None)
    with pytest.raises(RuntimeError, match="being captured"):
        refuse_first_in_capture(shapes, x, h, torch.tensor([2, 2]))


def test_a_refused_launch_is_tried_another_way(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    monkeypatch.setattr(time_loop.TimeLoop, "_can_be_resident", lambda *_: True)
    tried = []

    def launch(self, way, *arguments, **options):
        tried.append(way.text.partition(":")[0])
        if way.exchange_mode == 2:
            raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")
        return launch_it(self, way, *arguments, **options)

    launch_it = time_loop.TimeLoop._launch
    monkeypatch.setattr(time_loop.TimeLoop, "_launch", launch)
    directions = random_directions("LSTM", 4, 300, density=0.05)
    x, states, sizes = random_call("LSTM", 4, 300, 1, (1, 1))
    layer = RecurrentLayer("LSTM", directions, device=DEVICE)
    assert_close(layer(x, states, None), expected("LSTM", directions, x, states, sizes))
    assert tried == ["on chip", "streamed", "step by step", "step by step"]
    assert layer.describe(1).startswith("step by step: 19 programs of 16 units x ")


def test_which_layers_can_be_stacked():
    def layer(**options) -> RecurrentLayer:
        return RecurrentLayer("GRU", random_directions("GRU", 20, 20, **options), device=DEVICE)

    plain, dense, narrow = layer(), layer(dense_input=True), layer(dtype=torch.bfloat16)
    assert can_be_stacked([plain, plain])
    assert can_be_stacked([dense, plain])
    assert not can_be_stacked([plain])
    assert not can_be_stacked([plain, dense])
    assert not can_be_stacked([plain, narrow])
    assert not can_be_stacked([layer(D=2), layer(D=2)])
    assert can_be_stacked([plain, layer(pattern=Picks())])


def test_a_stack_that_cannot_be_resident_runs_layer_by_layer(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    monkeypatch.setattr(time_loop.TimeLoop, "_can_be_resident", lambda self, way, *_: way.exchange_mode != 2)
    directions = [random_directions("LSTM", I, 20) for I in (4, 20, 20)]
    layers = [RecurrentLayer("LSTM", direction, device=DEVICE) for direction in directions]
    stack = RecurrentStack(layers)
    x, states, sizes = random_call("LSTM", 4, 20, 3, RAGGED)
    results = stack(x, states, sizes)
    exact, ends = x, []
    for k, direction in enumerate(directions):
        exact, *end = expected("LSTM", direction, exact, [state[k : k + 1] for state in states], sizes)
        ends.append(end)
    assert_close(results, [exact, *(torch.cat(parts) for parts in zip(*ends, strict=True))])
    assert stack.describe(1).startswith("3 layers at once: on chip: ")
    assert stack.describe(4).startswith("on chip: ")  # by itself, as it ran
    projected = []
    monkeypatch.setattr(layers[0], "project", lambda x, project=layers[0].project: projected.append(x) or project(x))
    stack(x, states, sizes)
    assert len(projected) == 1  # not once more for a launch of all layers, which is known to be refused
