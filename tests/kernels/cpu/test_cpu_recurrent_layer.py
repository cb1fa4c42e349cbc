"""Every cell in float32 against nn.RNN, nn.GRU and nn.LSTM in float64."""

import itertools
import threading

import pytest
import torch
from cpu_layers import MODES, RAGGED, Layer, assert_as_accurate_as_torch

from triton_sparse_rnn.kernels.cpu.recurrent_layer import RecurrentLayer
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.picks import Picks

PATTERNS = [
    *((16, 1), (16, 4), (16, 16), (16, 32), (32, 3), (8, 2), (4, 3), (1, 1), (5, 3), (12, 1), (48, 1), (20, 7)),
    *(Picks(), Picks(16, 64, 4), Picks(16, 16, 2), Picks(16, 8), Picks(32, 64), Picks(8, 32), Picks(24, 64, 2)),
    *(Picks(7, 16), Picks(48, 32, 4), Picks(1, 8, 4)),
]
TALL = [19, 11, 8, 7, 5, 4, 3, 2, 1, 1]  # tiles of 8, 4, 2 and 1 rows in every mixture


@pytest.mark.parametrize("number", range(len(PATTERNS)))
def test_patterns(number):
    """Each one in both weights, with another one in the other weight, and each cell with several."""
    mode = MODES[number % len(MODES)]
    block_hh, block_ih = PATTERNS[number], PATTERNS[number - 5]
    for I, H, bias in ((40, 96, True), (37, 53, False), (3, 5, True), (1, 1, True)):
        layer = Layer(mode, I, H, block_ih, block_hh, bias=bias)
        assert_as_accurate_as_torch(layer, TALL)
        assert_as_accurate_as_torch(layer, [1, 1], rectangular=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("patterns", "sizes"), [(((5, 3), (4, 3)), 14), ((Picks(16, 8, 2), Picks(8, 16)), 34)])
def test_every_remainder(mode, patterns, sizes):
    for size in range(1, sizes):
        for other in (1, 7, 12):
            assert_as_accurate_as_torch(Layer(mode, size, other, *patterns), [3, 3], rectangular=True)
            assert_as_accurate_as_torch(Layer(mode, other, size, *patterns), [1, 1], rectangular=True)


@pytest.mark.parametrize("mode", MODES)
def test_rectangular_batches(mode):
    layer = Layer(mode, 21, 37, (5, 3), (4, 3))
    for T, B in itertools.product((1, 2, 5), range(1, 20)):
        assert_as_accurate_as_torch(layer, [B] * T, rectangular=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("batch_sizes", [[1], [7], [9, 1], [3, 2, 1], [4, 4, 4, 1, 1], list(range(19, 0, -2))])
def test_ragged_batches(mode, D, batch_sizes):
    assert_as_accurate_as_torch(Layer(mode, 21, 37, (5, 3), (4, 3), D=D), batch_sizes)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_sizes", [[1] * 400, [3] * 80, [40] * 18, list(range(40, 0, -1))])
def test_more_rows_than_are_projected_at_a_time(mode, batch_sizes):
    """Of 300 units, 256 KB hold 54 rows of four gates and 218 of one, and there are at least eight steps."""
    layer = Layer(mode, 10, 300, (5, 3), (4, 3), density=0.05)
    assert_as_accurate_as_torch(layer, batch_sizes, rectangular=len(set(batch_sizes)) == 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", [True, False])
def test_dense_input_weight(mode, bias):
    for H in (37, 36):
        layer = Layer(mode, 21, H, None, (4, 3), bias=bias)
        assert_as_accurate_as_torch(layer, RAGGED)
        assert_as_accurate_as_torch(layer, [1] * 3, rectangular=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("patterns", [((5, 3), (4, 3)), (Picks(16, 8, 2), Picks(8, 16))])
def test_no_blocks_and_all_blocks(mode, density, bias, patterns):
    assert_as_accurate_as_torch(Layer(mode, 21, 37, *patterns, density=density, bias=bias), RAGGED)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["weight_ih", "weight_hh"])
def test_gate_and_row_group_without_blocks(mode, name):
    layer = Layer(mode, 21, 37, (4, 3), (4, 3))
    direction = layer.directions[0]
    matrix = getattr(direction, name)
    rows = matrix.to_dense().view(matrix.gates, 37, -1)
    rows[matrix.gates // 2] = 0
    rows[:, 8:16] = 0
    emptied = BlockMatrix.from_dense(rows.flatten(0, 1), matrix.block_size, gates=matrix.gates)
    layer.directions[0] = direction._replace(**{name: emptied})
    assert_as_accurate_as_torch(layer, RAGGED)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("T", "B"), [(0, 2), (4, 0), (0, 0)])
def test_nothing_to_do(mode, T, B):
    layer = Layer(mode, 21, 37, (5, 3), (4, 3))
    x, states = layer.random_inputs([B])
    x = torch.empty(T * B, 21)
    for batch_sizes in (None, torch.full((T,), B)):
        y, *ends = layer.ready()(x, states, batch_sizes)
        assert y.shape == (0, 2 * layer.P)
        assert all(map(torch.equal, ends, states))
        assert not any(end.data_ptr() == state.data_ptr() != 0 for end, state in zip(ends, states, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_same_bits_every_time(mode):
    """Also after calls of so many other shapes that their plans are forgotten."""
    layer = Layer(mode, 21, 37, (5, 3), (4, 3))
    ready, inputs = layer.ready(), layer.random_inputs(RAGGED)
    first = ready(*inputs, torch.tensor(RAGGED))
    for T in range(1, 100):
        ready(*layer.random_inputs([1] * T), None)
    for _ in range(5):
        assert all(map(torch.equal, ready(*inputs, torch.tensor(RAGGED)), first))


def test_threads_of_python_share_nothing():
    """Among them the first use of a block size, which compiles."""
    layer = Layer("GRU", 21, 37, (7, 5), (7, 5))
    ready: list[RecurrentLayer] = []
    inputs = [layer.random_inputs([n + 1] * 30) for n in range(4)]
    results = {}

    def work(n):
        ready.append(layer.ready())
        results[n] = [ready[0](inputs[n][0], inputs[n][1], None) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for n, runs in results.items():
        expected = ready[0](inputs[n][0], inputs[n][1], None)
        assert all(torch.equal(a, b) for run in runs for a, b in zip(run, expected, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_no_memory_is_said(mode):
    layer = Layer(mode, 21, 37, (5, 3), (4, 3))
    ready, inputs = layer.ready(), layer.random_inputs([1])
    ready._run = lambda *arguments: False
    with pytest.raises(MemoryError, match="no memory"):
        ready(*inputs, None)
