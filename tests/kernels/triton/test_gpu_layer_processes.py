"""Layers whose programs exchange h, each program in a process of its own: both time loops, every cell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from program_processes import DIED, Conduct, InProcesses, Outcome, ProgramId
from torch import Tensor

from triton_sparse_rnn.kernels.triton import resident, streamed, time_loop
from triton_sparse_rnn.kernels.triton.recurrent_layer import RecurrentLayer, RecurrentStack
from triton_sparse_rnn.kernels.triton.tiles import SLOTS, Residency, ResidentTile
from triton_sparse_rnn.ops.backends.reference import recurrent_layer
from triton_sparse_rnn.ops.layer_weights import LayerWeights
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.layer_config import GATES
from triton_sparse_rnn.sparse.picks import Picks

CPU = torch.device("cpu")
I = 3
IMPATIENT = 500  # polls, a second or so
RAGGED = torch.tensor([5, 4, 1])
SENTINEL_NAN = torch.tensor(-1, dtype=torch.int32).view(torch.float32)


@triton.jit
def publish_any_nan(ptr, h, mask):
    tl.store(ptr, h.to(tl.int32, bitcast=True), mask=mask)


@triton.jit
def do_not_wait(
    words, base_ptr, columns, stride_bytes, status_ptr, spin_limit, PACK, PORTABLE, HALF=0, HAS_BELOW=0, H=0, below=0
):
    return words.to(tl.float32, bitcast=True)


def random_direction(mode: str, H: int, *, inputs: int, density: float, block_rows: int, picked: bool) -> LayerWeights:
    G = GATES[mode]

    def blocks(columns: int) -> BlockMatrix:
        rows = 1 if picked else block_rows
        mask = torch.rand(G, -(-H // rows), 1, columns) < density
        mask = mask.expand(-1, -1, rows, -1).flatten(1, 2)[:, :H].flatten(0, 1)
        weight = torch.randn(G * H, columns) * mask / (density * columns) ** 0.5
        dtype = torch.bfloat16 if picked and mode == "LSTM" else None
        return BlockMatrix.from_dense(weight, Picks() if picked else (block_rows, 1), gates=G, dtype=dtype)

    return LayerWeights(blocks(inputs), blocks(H), torch.randn(G * H) / 2, torch.randn(G * H) / 2)


class Layers:
    """Random layers, P programs for each direction: one layer, or L of one direction that run as a wavefront."""

    def __init__(
        self, mode: str, P: int, *, picked: bool, D: int = 1, L: int = 1, density: float = 0.4, block_rows: int = 16
    ) -> None:
        H = 16 * P - 3
        self.mode, self.H, self.states = mode, H, D * L
        self.weights = [
            [
                random_direction(
                    mode, H, inputs=D * H if k else I, density=density, block_rows=block_rows, picked=picked
                )
                for _ in range(D)
            ]
            for k in range(L)
        ]
        layers = [RecurrentLayer(mode, directions, device=CPU) for directions in self.weights]
        self.run = layers[0] if L == 1 else RecurrentStack(layers)

    def random_inputs(self, batch_sizes: Tensor) -> tuple[Tensor, list[Tensor]]:
        states = [torch.randn(self.states, int(batch_sizes[0]), self.H) / 2 for _ in range(1 + (self.mode == "LSTM"))]
        return torch.randn(int(batch_sizes.sum()), I), states

    def expected(self, x: Tensor, states: list[Tensor], batch_sizes: Tensor) -> list[Tensor]:
        y, ends = x.double(), []
        for k, directions in enumerate(self.weights):
            D = len(directions)
            own = [state[k * D : (k + 1) * D].double() for state in states]
            y, *end = recurrent_layer(y, own, directions, batch_sizes, self.mode)
            ends.append(end)
        return [y, *(torch.cat(parts) for parts in zip(*ends, strict=True))]


@pytest.fixture(params=[1, None], ids=["resident", "streamed"])
def rows(request: pytest.FixtureRequest) -> int | None:
    """Of the batch, for each program of resident.py; None for streamed.py."""
    return request.param


@pytest.fixture(params=[False, True], ids=["blocks", "picks"])
def picked(request: pytest.FixtureRequest) -> bool:
    """Whether weights are picks; those of an LSTM are then narrow, with their columns beside them."""
    return request.param


@pytest.fixture
def kernels(rows: int | None, monkeypatch: pytest.MonkeyPatch) -> InProcesses:
    """Both kernels, in processes where they exchange h, which they then always do; `how` and `outcomes` are shared."""

    def choose_residency(
        mode: str, hidden_size: int, columns: int, itemsize: int, *, directions: int, batch_size: int, picked: bool,
        **others: Any,
    ) -> Residency | None:  # fmt: skip
        if rows is None:
            return None
        tile = ResidentTile(
            slots=SLOTS[mode], itemsize=itemsize, groups=1, rows=rows, num_warps=4, ko=1, tiles=8, registers=168,
            picked=picked, ahead=2,
        )  # fmt: skip
        slices = -(-batch_size // rows)
        return Residency(tile, -(-columns // tile.tile_columns), -(-hidden_size // 16), directions, slices, slices)

    torch.manual_seed(0)
    on_chip, from_l2 = InProcesses(resident.resident_steps), InProcesses(streamed.streamed_steps)
    from_l2.how, from_l2.outcomes = on_chip.how, on_chip.outcomes
    monkeypatch.setattr(resident, "resident_steps", on_chip)
    monkeypatch.setattr(streamed, "streamed_steps", from_l2)
    monkeypatch.setattr(time_loop, "choose_residency", choose_residency)
    monkeypatch.setattr(time_loop.TimeLoop, "_can_be_resident", lambda *arguments: True)
    return on_chip


def assert_right(got: list[Tensor], expected: list[Tensor]) -> None:
    for result, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=5e-6, equal_nan=True)


def assert_same_bits(got: list[Tensor], other: list[Tensor]) -> None:
    for result, before in zip(got, other, strict=True):
        assert torch.equal(result.view(torch.int32), before.view(torch.int32))


def rectangle(T: int, B: int = 1) -> Tensor:
    return torch.full((T,), B)


def delays(outcome: Outcome, seed: int) -> dict[ProgramId, Conduct]:
    """For all programs of a launch."""
    return dict.fromkeys(outcome.exit_codes, Conduct(delay_s=0.003, seed=seed))


@pytest.mark.parametrize(("mode", "P"), [("RNN_TANH", 2), ("RNN_RELU", 2), ("GRU", 3), ("LSTM", 4)])
def test_every_cell_with_several_programs(kernels: InProcesses, picked: bool, mode: str, P: int):
    layer = Layers(mode, P, picked=picked)
    x, states = layer.random_inputs(rectangle(3))
    assert_right(layer.run(x, states, None), layer.expected(x, states, rectangle(3)))
    (outcome,) = kernels.outcomes
    assert len(outcome.writes) == P
    assert (outcome.writes.sum(0)[:, :, : layer.H] == 1).all()
    assert (outcome.writes.sum(0)[:, :, layer.H] == 0).all()


@pytest.mark.parametrize("rows", [2, None], ids=["resident", "streamed"])
def test_directions_side_by_side_and_slices_of_a_ragged_batch(kernels: InProcesses, picked: bool, rows: int | None):
    layer = Layers("LSTM", 2, D=2, block_rows=4, picked=picked)
    x, states = layer.random_inputs(RAGGED)
    assert_right(layer.run(x, states, RAGGED), layer.expected(x, states, RAGGED))
    (outcome,) = kernels.outcomes
    assert rows is None or len(outcome.writes) == 2 * 2 * 3
    assert outcome.writes.sum(0).max() == 1


@pytest.mark.parametrize("rows", [2], ids=["resident"])
@pytest.mark.parametrize(("mode", "batch_sizes"), [("RNN_TANH", [1, 1, 1]), ("GRU", [2, 2, 1]), ("LSTM", [2, 1, 1])])
def test_layers_as_a_wavefront(kernels: InProcesses, picked: bool, mode: str, batch_sizes: list[int]):
    sizes = torch.tensor(batch_sizes)
    layers = Layers(mode, 2, L=3, picked=picked)
    x, states = layers.random_inputs(sizes)
    undisturbed = layers.run(x, states, sizes)
    assert_right(undisturbed, layers.expected(x, states, sizes))
    (outcome,) = kernels.outcomes
    assert outcome.writes.sum(0).max() == 1
    kernels.how["conduct"] = {**delays(outcome, seed=0), (1, 0, 0): Conduct(late_s=0.3)}
    assert_same_bits(layers.run(x, states, sizes), undisturbed)


def test_late_programs_and_delays_change_no_bit(kernels: InProcesses, picked: bool):
    layer = Layers("GRU", 3, picked=picked)
    x, states = layer.random_inputs(rectangle(12))
    undisturbed = layer.run(x, states, None)
    assert_right(undisturbed, layer.expected(x, states, rectangle(12)))
    kernels.how["conduct"] = {(1, 0, 0): Conduct(late_s=0.3)}
    assert_same_bits(layer.run(x, states, None), undisturbed)
    kernels.how["conduct"] = delays(kernels.outcomes[0], seed=0)
    assert_same_bits(layer.run(x, states, None), undisturbed)


@pytest.mark.slow("processes")
@pytest.mark.parametrize("mode", ["RNN_TANH", "GRU", "LSTM"])
def test_delays_over_many_steps_change_no_bit(kernels: InProcesses, picked: bool, mode: str):
    layer = Layers(mode, 4, picked=picked)
    x, states = layer.random_inputs(rectangle(100))
    kernels.how["limit_s"] = 300
    undisturbed = layer.run(x, states, None)
    assert_right(undisturbed, layer.expected(x, states, rectangle(100)))
    kernels.how["conduct"] = delays(kernels.outcomes[0], seed=1)
    assert_same_bits(layer.run(x, states, None), undisturbed)


@pytest.mark.parametrize("value", [SENTINEL_NAN, torch.tensor(torch.inf)], ids=["nan", "infinity"])
def test_nan_and_infinity_are_handed_over(kernels: InProcesses, picked: bool, value: Tensor):
    """The NaN has the sentinel's bits; few weights are stored, so that it does not get everywhere."""
    layer = Layers("RNN_RELU", 3, density=0.05, picked=picked)
    x, states = layer.random_inputs(rectangle(3))
    states[0][0, 0, layer.weights[0][0].weight_hh.input_places().flatten()[0]] = value
    expected = layer.expected(x, states, rectangle(3))
    assert 0 < (~expected[0].isfinite()).sum() < expected[0].numel()
    assert_right(layer.run(x, states, None), expected)


# The bound takes seconds each time.
@pytest.mark.parametrize(
    "rows", [1, pytest.param(None, marks=pytest.mark.slow("processes"))], ids=["resident", "streamed"]
)
def test_a_program_that_dies_ends_no_call_and_is_told_at_the_next(kernels: InProcesses, picked: bool):
    layer = Layers("GRU", 3, density=1.0, picked=picked)
    x, states = layer.random_inputs(rectangle(8))
    kernels.how.update(conduct={(1, 0, 0): Conduct(dies_in_slot=2)}, limit_s=60)
    layer.run.time_loop.spin_limit = IMPATIENT
    y, _ = layer.run(x, states, None)
    assert kernels.outcomes[0].exit_codes == {(0, 0, 0): 0, (1, 0, 0): DIED, (2, 0, 0): 0}
    alive = [*range(16), *range(32, layer.H)]
    expected = layer.expected(x, states, rectangle(8))
    assert_right([y[:2, alive]], [expected[0][:2, alive]])
    assert y[2:, alive].isnan().all()
    with pytest.raises(RuntimeError, match="gave up"):
        layer.run(x, states, None)
    kernels.how.clear()
    assert_right(layer.run(x, states, None), expected)


def test_a_nan_that_is_published_as_it_is_is_seen(kernels: InProcesses, picked: bool):
    layer = Layers("GRU", 3, picked=picked)
    x, states = layer.random_inputs(rectangle(3))
    states[0][0, 0, 20] = SENTINEL_NAN
    kernels.how.update(replaced={"publish": publish_any_nan}, limit_s=2)
    with pytest.raises(TimeoutError, match="were still running"):
        layer.run(x, states, None)


def test_a_reader_that_does_not_wait_is_seen(kernels: InProcesses, picked: bool):
    layer = Layers("GRU", 3, picked=picked)
    x, states = layer.random_inputs(rectangle(3))
    kernels.how.update(replaced={"wait": do_not_wait}, conduct={(0, 0, 0): Conduct(late_s=0.5)})
    y = layer.run(x, states, None)[0]
    assert y[:, 16:].isnan().any()
