"""The GRU layer of kernels/cpu against nn.GRU in float64 and, where values are not finite, its equations."""

import threading

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from triton_sparse_rnn.kernels.cpu.gru import gru_layer
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.blocks import count_blocks, expand_block_mask

INF, NAN = float("inf"), float("nan")
RAGGED = [5, 5, 4, 2, 2, 1, 1, 1]


def make_matrix(gates, H, columns, block_size, density):
    """A random BlockMatrix [gates * H, columns] of about this density, with outputs of the size of a dense one's."""
    kept = torch.rand(gates, *count_blocks(H, columns, block_size)) < density
    mask = expand_block_mask(kept, block_size, H, columns).flatten(0, 1)
    weight = torch.randn(gates * H, columns) * mask / max(1.0, columns * density) ** 0.5
    return BlockMatrix.from_dense(weight, block_size, gates=gates)


class Layer:
    """Weights of one direction, and the calls that are compared."""

    def __init__(self, I, H, BR, BC_ih, BC_hh, density=0.4, bias=True):
        self.I, self.H = I, H
        self.weight_ih = make_matrix(3, H, I, (BR, BC_ih), density)
        self.weight_hh = make_matrix(3, H, H, (BR, BC_hh), density)
        self.biases = (torch.randn(3 * H) / 2, torch.randn(3 * H) / 2) if bias else (None, None)

    def random_inputs(self, batch_sizes):
        return torch.randn(sum(batch_sizes), self.I), torch.randn(batch_sizes[0], self.H)

    def run(self, x, h0, batch_sizes=None, reverse=False):
        """Return y and h_n of one direction; the part of the other stays untouched."""
        y, h_n = torch.full((len(x), 2 * self.H), NAN), torch.full((2, *h0.shape), NAN)
        sizes, direction, other = (
            None if batch_sizes is None else torch.tensor(batch_sizes),
            int(reverse),
            int(not reverse),
        )
        both = torch.stack([h0, h0])
        both[other] = NAN
        gru_layer(x, both, self.weight_ih, self.weight_hh, *self.biases, sizes, direction=direction, y=y, h_n=h_n)
        ours, others = (y.unflatten(1, (2, self.H))[:, d] for d in (direction, other))
        assert others.isnan().all()
        assert h_n[other].isnan().all()
        return ours.clone(), h_n[direction]

    def dense(self, x, h0, batch_sizes, reverse, dtype):
        """The same of nn.GRU, whose second direction is `reverse`."""
        gru = torch.nn.GRU(self.I, self.H, bias=self.biases[0] is not None, bidirectional=True, dtype=dtype)
        weights = [self.weight_ih.to_dense(), self.weight_hh.to_dense(), *(b for b in self.biases if b is not None)]
        with torch.no_grad():
            for parameter, weight in zip(gru.parameters(), weights * 2, strict=True):
                parameter.copy_(weight)
            packed = PackedSequence(x.to(dtype), torch.tensor(batch_sizes))
            y, h_n = gru(packed, h0.to(dtype).expand(2, -1, -1).contiguous())
        return y.data[:, self.H * reverse :][:, : self.H], h_n[int(reverse)]

    def by_equations(self, x, h0):
        """The same in float64 for steps of len(h0) rows. A block that is not stored does not read its input."""
        b_ih, b_hh = (torch.zeros(3 * self.H) if bias is None else bias.double() for bias in self.biases)
        h, states = h0.double(), []
        for x_t in x.double().split(len(h0)):
            projected = (block_product(self.weight_ih, x_t) + b_ih).chunk(3, dim=1)
            recurrent = (block_product(self.weight_hh, h) + b_hh).chunk(3, dim=1)
            r, z = ((projected[i] + recurrent[i]).sigmoid() for i in range(2))
            n = (projected[2] + r * recurrent[2]).tanh()
            h = n + z * (h - n)
            states.append(h)
        return torch.cat(states), h


def block_product(matrix, x):
    """Return x [B, columns] times the transposed matrix, block by block."""
    (BR, BC), (gates, groups, block_columns) = matrix.block_size, matrix.block_grid
    blocks = F.pad(x, (0, block_columns * BC - x.shape[1])).unflatten(1, (block_columns, BC))
    products = torch.einsum("bkc,kcr->bkr", blocks[:, matrix.columns.long()], matrix.values.double())
    rows = x.new_zeros(len(x), groups * gates, BR).index_add(1, matrix.block_rows, products)
    return rows.unflatten(1, (groups, gates)).transpose(1, 2).flatten(2)[:, :, : matrix.shape[0] // gates].flatten(1)


def assert_as_accurate_as_torch(layer, batch_sizes, reverse=False, rectangular=False):
    x, h0 = layer.random_inputs(batch_sizes)
    ours = layer.run(x, h0, None if rectangular else batch_sizes, reverse)
    exact = layer.dense(x, h0, batch_sizes, reverse, torch.float64)
    theirs = layer.dense(x, h0, batch_sizes, reverse, torch.float32)
    for our, their, right in zip(ours, theirs, exact, strict=True):
        error, their_error = ((result - right).abs().max() for result in (our, their))
        assert error <= 4 * their_error + 1e-6


@pytest.fixture(autouse=True)
def _one_thread():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("blocks", [(16, 1, 1), (16, 4, 4), (32, 3, 1), (8, 2, 8), (2, 20, 33), (1, 1, 1)])
def test_block_sizes(blocks, reverse, bias):
    for I, H in ((40, 64), (37, 53), (3, 5), (1, 1)):
        layer = Layer(I, H, *blocks, bias=bias)
        assert_as_accurate_as_torch(layer, RAGGED, reverse)
        assert_as_accurate_as_torch(layer, [1, 1], reverse, rectangular=True)


@pytest.mark.parametrize("size", range(1, 14))
def test_every_remainder(size):
    for other in (1, 7, 12):
        assert_as_accurate_as_torch(Layer(size, other, 4, 3, 5), [3, 3], rectangular=True)
        assert_as_accurate_as_torch(Layer(other, size, 4, 3, 5), [3, 3], rectangular=True)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("B", [1, 2, 3, 5, 9, 16])
@pytest.mark.parametrize("T", [1, 2, 11])
def test_rectangular_batches(T, B, reverse):
    assert_as_accurate_as_torch(Layer(21, 37, 4, 3, 5), [B] * T, reverse, rectangular=True)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("batch_sizes", [[1], [7], [9, 1], [3, 2, 1], [4, 4, 4, 1, 1], list(range(19, 0, -2))])
def test_ragged_batches(batch_sizes, reverse):
    assert_as_accurate_as_torch(Layer(21, 37, 4, 3, 5), batch_sizes, reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("batch_sizes", [[1] * 100, [3] * 50, [40] * 12, list(range(30, 0, -1))])
def test_more_rows_than_are_projected_at_a_time(batch_sizes, reverse):
    """Of 3 * 300 floats, 256 KB hold 72 rows, and there are at least eight steps."""
    layer = Layer(10, 300, 4, 3, 5, density=0.05)
    assert_as_accurate_as_torch(layer, batch_sizes, reverse, rectangular=len(set(batch_sizes)) == 1)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_no_blocks_and_all_blocks(density, reverse):
    assert_as_accurate_as_torch(Layer(21, 37, 4, 3, 5, density=density), RAGGED, reverse)


@pytest.mark.parametrize("gate", range(3))
def test_gate_without_blocks(gate):
    layer = Layer(21, 37, 4, 3, 5)
    dense = layer.weight_hh.to_dense()
    dense[gate * 37 : (gate + 1) * 37] = 0
    layer.weight_hh = BlockMatrix.from_dense(dense, (4, 5), gates=3)
    assert_as_accurate_as_torch(layer, RAGGED)


@pytest.mark.parametrize("T", [0, 4])
def test_nothing_to_do(T):
    layer = Layer(21, 37, 4, 3, 5)
    B = 0 if T else 2
    h0 = torch.randn(B, 37)
    y, h_n = layer.run(torch.randn(T * B, 21), h0)
    assert y.shape == (T * B, 37)
    assert torch.equal(h_n, h0)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["x", "h0", "weight_ih", "weight_hh"])
def test_what_is_not_finite_reaches_only_what_depends_on_it(where, value):
    """At the last unit and column as well, where blocks are filled up."""
    spread = 0
    for column in (0, -1):
        for seed in range(4):
            torch.manual_seed(seed)
            layer = Layer(8, 18, 4, 3, 5, density=0.3)
            x, h0 = layer.random_inputs([2] * 3)
            if where in ("x", "h0"):
                {"x": x, "h0": h0}[where][1, column] = value
            else:
                getattr(layer, where).values[column, 0, 0] = value
            for result, expected in zip(layer.run(x, h0), layer.by_equations(x, h0), strict=True):
                torch.testing.assert_close(result.double(), expected, rtol=0, atol=2e-6, equal_nan=True)
                spread += bool(result.isnan().any() and result.isfinite().any())
    assert spread or value == INF or value == -INF


def test_same_bits_every_time():
    layer = Layer(37, 53, 16, 1, 1)
    x, h0 = layer.random_inputs(RAGGED)
    first = layer.run(x, h0, RAGGED)
    for _ in range(5):
        assert all(map(torch.equal, layer.run(x, h0, RAGGED), first))


def test_steps_are_the_whole():
    layer = Layer(37, 53, 16, 1, 1)
    x, h = layer.random_inputs([2] * 6)
    whole, h_n = layer.run(x, h)
    for x_t, expected in zip(x.split(2), whole.split(2), strict=True):
        y, h = layer.run(x_t, h)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(h, h_n, rtol=0, atol=1e-6)


def test_threads_share_nothing():
    """Among them the first use of a block size, which compiles."""
    layer = Layer(37, 128, 8, 7, 7)
    inputs = [layer.random_inputs([n + 1] * 50) for n in range(4)]
    results = {}

    def work(n):
        results[n] = [layer.run(*inputs[n]) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, runs in results.items():
        expected = layer.run(*inputs[n])
        assert all(torch.equal(a, b) for run in runs for a, b in zip(run, expected, strict=True))
    assert len(results) == 4
