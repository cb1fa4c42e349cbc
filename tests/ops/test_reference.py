import math

import pytest
import torch
from rounding import rounding_of_sums
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from triton_sparse_rnn.ops.backends import reference
from triton_sparse_rnn.ops.layer_weights import LayerWeights, StoredLayer
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.layer_config import GATES


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that an operator returns."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.nbytes = max(self.nbytes, result.untyped_storage().nbytes())
        return result


def make_matrix(block_size: tuple[int, int], density: float = 0.5) -> BlockMatrix:
    torch.manual_seed(0)
    weight = torch.randn(3 * 37, 40).masked_fill(torch.rand(3 * 37, 40) > density, 0)
    return BlockMatrix.from_dense(weight, block_size, gates=3)


@pytest.mark.parametrize("block_size", [(16, 1), (5, 3)])
@pytest.mark.parametrize("density", [0, 0.5])
@pytest.mark.parametrize("chunk_bytes", [1, 20_000])
def test_the_product_of_blocks_in_chunks(monkeypatch, block_size, density, chunk_bytes):
    matrix, bias = make_matrix(block_size, density), torch.randn(3 * 37)
    for rows in (0, 1, 23):
        x = torch.randn(rows, 40).double()
        expected = reference.block_linear(matrix, bias, torch.float64)(x)
        with monkeypatch.context() as patch:
            patch.setattr(reference, "CHUNK_BYTES", chunk_bytes)
            y = reference.block_linear(matrix, bias, torch.float64)(x)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)


def test_the_product_of_blocks_takes_bounded_memory(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_BYTES", 2**20)
    linear = reference.block_linear(make_matrix((1, 1)), None, torch.float32)
    x = torch.full((2_000, 40), float("nan"))
    with LargestTensor() as largest:
        y = linear(x)
    assert y.nbytes <= largest.nbytes <= 2**20
    assert y.isnan().all()


def make_layer(mode: str, weight_dtype: torch.dtype | None = None, proj_size: int = 0, I: int = 7) -> LayerWeights:
    """A direction with H = 6 and a third of its weights pruned."""
    torch.manual_seed(0)
    rows, hidden = GATES[mode] * 6, proj_size or 6

    def make(rows: int, columns: int, gates: int) -> BlockMatrix:
        weight = torch.randn(rows, columns).masked_fill(torch.rand(rows, columns) < 0.3, 0)
        return BlockMatrix.from_dense(weight, (4, 2), gates=gates, dtype=weight_dtype)

    hr = make(proj_size, 6, 1) if proj_size else None
    gates = GATES[mode]
    return LayerWeights(make(rows, I, gates), make(rows, hidden, gates), torch.randn(rows), torch.randn(rows), hr)


def make_call(mode: str, proj_size: int = 0, B: int = 3) -> tuple[Tensor, list[Tensor]]:
    states = [torch.randn(1, B, proj_size or 6)] + ([torch.randn(1, B, 6)] if mode == "LSTM" else [])
    return torch.randn(5 * B, 7), states


def assert_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 0) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("mode", GATES)
@pytest.mark.parametrize("value", [0.5, math.inf])
def test_a_dense_input_weight(mode, value):
    weights = make_layer(mode)
    assert isinstance(weights.weight_ih, BlockMatrix)
    dense = weights._replace(weight_ih=weights.weight_ih.to_dense())
    x, states = make_call(mode)
    states[0][0, 1, 2] = value  # infinity takes the products of weight_hh block by block, those of weight_ih as ever
    y = reference.recurrent_layer(x, states, [weights], None, mode)
    tolerance = rounding_of_sums(5 * (7 + 6 + 2))  # over five steps, as "RNN_RELU" need not forget
    assert_close(reference.recurrent_layer(x, states, [dense], None, mode), y, tolerance)


def test_a_dense_input_weight_reads_every_input():
    weights = make_layer("GRU")._replace(weight_ih=torch.zeros(18, 7))
    x, states = make_call("GRU")
    x[7, 3] = math.nan
    y = reference.recurrent_layer(x, states, [weights], None, "GRU")[0].view(5, 3, 6)
    assert y[2:, 1].isnan().all()
    assert not y[:2].isnan().any()
    assert not y[:, [0, 2]].isnan().any()


@pytest.mark.parametrize("activation_dtype", [None, torch.int8])
@pytest.mark.parametrize("proj_size", [0, 4])
def test_a_prepared_layer(activation_dtype, proj_size):
    weights = [make_layer("LSTM", torch.int8, proj_size)] * 2
    x, states = make_call("LSTM", proj_size)
    states, sizes = [state.repeat(2, 1, 1) for state in states], torch.tensor([3, 3, 3, 3, 2, 1])
    run_layer = reference.prepare_layer(StoredLayer("LSTM", weights, torch.float32, x.device, activation_dtype), 1)
    for batch_sizes in (None, sizes):
        expected = reference.recurrent_layer(x, states, weights, batch_sizes, "LSTM", activation_dtype=activation_dtype)
        assert_close(run_layer(x, states, batch_sizes), expected)


def quantized_product(weight: BlockMatrix, v: list[float]) -> list[float]:
    """The definition at the top of reference.py, number by number, with s and 1 / s in float32."""
    assert weight.scales is not None
    single = lambda number: torch.tensor(number, dtype=torch.float32).item()  # noqa: E731
    s = single(max(map(abs, v)) / 127)
    integers = [round(single(number * single(1 / s))) for number in v] if s >= 2**-126 else [0] * len(v)
    assert all(abs(integer) <= 127 for integer in integers)
    rows = (weight.to_dense() / weight.scales[:, None]).round().int().tolist()
    sums = [sum(a * b for a, b in zip(row, integers, strict=True)) for row in rows]
    return [s * scale * total for scale, total in zip(weight.scales.tolist(), sums, strict=True)]


@pytest.mark.parametrize("mode", GATES)
@pytest.mark.parametrize("scale", [1, 1e-20, 10])
def test_quantized_activations_are_their_definition(mode, scale):
    """One step, in exact arithmetic but for s and 1 / s."""
    weights = make_layer(mode, torch.int8, proj_size=4 if mode == "LSTM" else 0)
    x, states = make_call(mode, proj_size=4 if mode == "LSTM" else 0, B=1)
    x = x[:1] * scale
    assert isinstance(weights.weight_ih, BlockMatrix)
    assert weights.bias_ih is not None
    assert weights.bias_hh is not None
    p = torch.tensor(quantized_product(weights.weight_ih, x[0].tolist())) + weights.bias_ih
    a = torch.tensor(quantized_product(weights.weight_hh, states[0].flatten().tolist())) + weights.bias_hh
    expected = reference.CELLS[mode](p[None], a[None], *(state[0] for state in states))
    if weights.weight_hr is not None:
        expected[0] = torch.tensor([quantized_product(weights.weight_hr, expected[0][0].tolist())])
    y, *ends = reference.recurrent_layer(x, states, [weights], None, mode, activation_dtype=torch.int8)
    assert_close([y, *(end[0] for end in ends)], [expected[0], *expected], 2e-6)
    exact = reference.recurrent_layer(x, states, [weights], None, mode)[0]
    assert not torch.equal(exact, y)  # it does quantise
    assert (exact - y).abs().max() < 0.02 * exact.abs().max()


def test_integers_of_quantized_activations():
    rows = [[127.0, 0.5, 1.5, -2.5, -127], [0, 0, 0, 0, 0], [3e38, -3e38, 1e38, 1, 0], [1e-37, 5e-38, 0, 0, -1e-37]]
    q, s = reference.quantize_activations(torch.tensor([*rows, [1e-40, -1e-44, 0, 0, 0]]))
    assert q.tolist() == [[127, 0, 2, -2, -127], [0] * 5, [127, -127, 42, 0, 0], [0] * 5, [0] * 5]
    assert s[:2, 0].tolist() == [1, 0]
    rows = [[1, math.nan], [math.inf, 0], [1, -math.inf], [math.inf, math.nan], [0, -127]]
    _, s = reference.quantize_activations(torch.tensor(rows))
    assert s.isnan().flatten().tolist() == [True] * 4 + [False]
    q, _ = reference.quantize_activations(torch.tensor([[2e-36, 1e-36]]))  # 1 / s is still below the largest float32
    assert q.tolist() == [[127, 64]]
    many = torch.randn(1000, 9) * torch.logspace(-30, 30, 1000)[:, None]
    q, s = reference.quantize_activations(many)
    assert q.abs().amax(1).eq(127).all()
    torch.testing.assert_close(q * s, many, rtol=0, atol=math.inf)
    assert ((q * s - many).abs() <= s * 0.5001).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_quantized_activations_do_not_confine_nan_and_infinity(value):
    weights = make_layer("RNN_TANH", torch.int8)
    x, states = make_call("RNN_TANH")
    clean = reference.recurrent_layer(x, states, [weights], None, "RNN_TANH", activation_dtype=torch.int8)[0]
    x[7, 3] = value  # step 2, row 1
    y = reference.recurrent_layer(x, states, [weights], None, "RNN_TANH", activation_dtype=torch.int8)[0].view(5, 3, 6)
    assert y[2:, 1].isnan().all()
    y[2:, 1] = clean.view(5, 3, 6)[2:, 1]
    assert_close([y.flatten(0, 1)], [clean])


def test_integer_sums_are_exact():
    """300,000 products of 127 * 127 need 33 bits, and the last one counts."""
    weight = torch.full((1, 300_000), 1.0)
    weight[0, -1] = 1 / 127
    x = torch.ones(1, 300_000)
    y = reference.quantized_linear(BlockMatrix.from_dense(weight, (1, 1000), dtype=torch.int8), None, torch.float64)(
        x.double()
    )
    scale = (1 / 127) * torch.tensor(1 / 127).item()
    torch.testing.assert_close(y.item(), (299_999 * 127 * 127 + 127) * scale, rtol=1e-12, atol=0)
