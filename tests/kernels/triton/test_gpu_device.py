"""Converted layers on a GPU, as their users call them. Where there is none, `pytest -m gpu` interprets what it can."""

import copy
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from gpu_device import DEVICE
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from triton_sparse_rnn import PersistentGRU, PersistentLSTM, PersistentRNN
from triton_sparse_rnn.kernels.triton.exchange import INTERPRETED
from triton_sparse_rnn.sparse.blocks import count_blocks, expand_block_mask
from triton_sparse_rnn.sparse.layer_config import GATES
from triton_sparse_rnn.sparse.picks import Picks

pytestmark = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(INTERPRETED, reason="needs an NVIDIA GPU")

DENSE = {
    "RNN_TANH": functools.partial(nn.RNN, nonlinearity="tanh"),
    "RNN_RELU": functools.partial(nn.RNN, nonlinearity="relu"),
    "GRU": nn.GRU,
    "LSTM": nn.LSTM,
}
PERSISTENT: dict[str, Any] = {"RNN": PersistentRNN, "GRU": PersistentGRU, "LSTM": PersistentLSTM}
SMALL, T = (20, 3) if INTERPRETED else (300, 40)  # H of several programs, and steps
EXCHANGED = 1024  # on a GPU, H of many programs
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PATTERNS = pytest.mark.parametrize("pattern", [(16, 1), Picks()], ids=["blocks", "picks"])


def make_dense(
    mode: str = "GRU", H: int = SMALL, *, sparsity: float = 0.9, pattern=(16, 1), dtype=torch.float32, **options: Any
) -> nn.RNNBase:
    """A layer with input size H on the CPU, pruned at random."""
    generator = torch.Generator().manual_seed(0)
    layer = DENSE[mode](H, H, **options).eval().requires_grad_(False)
    for name, weight in layer.named_parameters():
        weight.uniform_(-1, 1, generator=generator)
        if not name.startswith("weight"):
            weight *= 0.1
            continue
        block_size = (1, 1) if isinstance(pattern, Picks) else pattern
        grid = count_blocks(H, weight.shape[1], block_size)
        kept = torch.rand(GATES[mode], *grid, generator=generator) >= sparsity
        weight *= expand_block_mask(kept, block_size, H, weight.shape[1]).flatten(0, 1)
        weight /= (weight.shape[1] * (1 - sparsity)) ** 0.5
    return layer.to(dtype)


def convert(dense: nn.RNNBase, *, backend: str | None = "triton", storage=(16, 1), device=DEVICE) -> Any:
    on_device = copy.deepcopy(dense).to(device)
    return PERSISTENT[dense.mode.partition("_")[0]].from_dense(on_device, storage=storage, backend=backend)


def make_input(dense: nn.RNNBase, B: int, steps: int = T, seed: int = 1) -> tuple[Tensor, Any]:
    """Return x and hx, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    dtype: Any = dense.weight_ih_l0.dtype
    x = torch.randn(steps, B, dense.input_size, generator=generator).to(dtype)
    states = torch.rand(2, dense.num_layers * (1 + dense.bidirectional), B, dense.hidden_size, generator=generator).to(
        dtype
    )
    return x, tuple(states) if dense.mode == "LSTM" else states[0]


def moved(value: Any, *place: Any) -> Any:
    """Tensors, tuples of them and packed sequences to a device or dtype."""
    return tuple(part.to(*place) for part in value) if type(value) is tuple else value.to(*place)


def tensors_of(result: Any) -> list[Tensor]:
    """Outputs, then states."""
    if isinstance(result, PackedSequence):
        return [result.data]
    return [result] if isinstance(result, Tensor) else [tensor for part in result for tensor in tensors_of(part)]


def run(layer: Any, x: Any, hx: Any = None) -> list[Tensor]:
    """Call a converted layer with what lies on the CPU."""
    return tensors_of(layer(moved(x, layer.device), None if hx is None else moved(hx, layer.device)))


def assert_right(results: list[Tensor], dense: nn.RNNBase, x: Any, hx: Any = None) -> None:
    """Within 4 times the error of torch.nn on the CPU in the same dtype, plus 4 roundings, against float64 there."""
    theirs = tensors_of(dense(x, hx))
    wide_hx = None if hx is None else moved(hx, torch.float64)
    exact = tensors_of(copy.deepcopy(dense).double()(moved(x, torch.float64), wide_hx))
    for ours, other, right in zip(results, theirs, exact, strict=True):
        assert (ours.shape, ours.dtype) == (other.shape, other.dtype)
        budget = 4 * (other - right).abs().max() + 4 * torch.finfo(ours.dtype).eps
        error = (ours.cpu() - right).abs().max()
        assert error <= budget, f"{error:.2e} exceeds {budget:.2e}"


def assert_same_bits(a: list[Tensor], b: list[Tensor]) -> None:
    for ours, other in zip(a, b, strict=True):
        assert torch.equal(ours.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@PATTERNS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", DENSE)
def test_layers_and_directions(mode, dtype, pattern):
    dense = make_dense(mode, num_layers=2, bidirectional=True, dtype=dtype, pattern=pattern)
    x, hx = make_input(dense, 3)
    assert_right(run(convert(dense, storage=pattern), x, hx), dense, x, hx)


@pytest.mark.parametrize("pattern", [(16, 1), (8, 2), (32, 1), Picks(), Picks(8, 16, 2)], ids=str)
@pytest.mark.parametrize("B", [1, 2] if INTERPRETED else [1, 7, 128])
@pytest.mark.parametrize("H", [16, 17] if INTERPRETED else [16, 257, 1024])
def test_sizes(H, B, pattern):
    dense = make_dense(H=H, pattern=pattern)
    x, hx = make_input(dense, B)
    assert_right(run(convert(dense, storage=pattern), x, hx), dense, x, hx)


@PATTERNS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", DENSE)
def test_ragged_batches(mode, dtype, pattern):
    dense = make_dense(mode, bidirectional=True, dtype=dtype, pattern=pattern)
    x, _ = make_input(dense, 4)
    packed = pack_sequence([x[:length, row] for row, length in enumerate((2, T, 1, T - 1))], enforce_sorted=False)
    _, hx = make_input(dense, 4, seed=2)
    assert_right(run(convert(dense, storage=pattern), packed, hx), dense, packed, hx)


@PATTERNS
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("H", "B"), [(2560, 1), (1024, 16)])
def test_long_sequences_of_large_layers(H, B, dtype, pattern):
    dense = make_dense(H=H, dtype=dtype, pattern=pattern)
    x, hx = make_input(dense, B, 1100 if B > 1 else 200)  # the longer one takes two launches
    assert_right(run(convert(dense, storage=pattern), x, hx), dense, x, hx)


@PATTERNS
@needs_gpu
@pytest.mark.parametrize("mode", ["GRU", "LSTM"])
@pytest.mark.filterwarnings("ignore:.*little to skip")
def test_a_layer_too_large_for_the_chip(mode, pattern):
    dense = make_dense(mode, 2048, sparsity=0.0)
    ours = convert(dense, storage=pattern)
    for B in (1, 5):
        x, hx = make_input(dense, B, 20)
        assert_right(run(ours, x, hx), dense, x, hx)


@PATTERNS
@pytest.mark.parametrize("mode", DENSE)
def test_steps_of_a_stream(mode, pattern):
    dense = make_dense(mode, num_layers=2, pattern=pattern)
    ours, (x, hx) = convert(dense, storage=pattern), make_input(dense, 2)
    state, outputs = moved(hx, DEVICE), []
    for x_t in moved(x, DEVICE):
        y_t, state = ours.step(x_t, state)
        outputs.append(y_t)
    assert_right([torch.stack(outputs), *tensors_of(state)], dense, x, hx)


@PATTERNS
@pytest.mark.parametrize("H", [SMALL, 40 if INTERPRETED else EXCHANGED])
def test_the_same_bits_every_time(H, pattern):
    dense = make_dense(H=H, pattern=pattern)
    ours, (x, hx) = convert(dense, storage=pattern), make_input(dense, 2)
    first = run(ours, x, hx)
    for _ in range(1 if INTERPRETED else 50):
        assert_same_bits(run(ours, x, hx), first)
    assert_same_bits(run(convert(dense, storage=pattern), x, hx), first)


@PATTERNS
@pytest.mark.parametrize("bits", [-1, 0x7FC00000, 0x7F800000])
def test_nan_and_infinity_arrive_and_nothing_waits_for_ever(bits, pattern):
    """The first two are NaN; -1 is the pattern that says that a word of the exchange is not there yet."""
    H = 40 if INTERPRETED else EXCHANGED
    dense = make_dense(H=H, pattern=pattern)
    ours, (x, hx) = convert(dense, storage=pattern), make_input(dense, 2)
    clean = run(ours, x, hx)[0]
    hx[0, 1].view(torch.int32)[H // 2] = bits
    y = run(ours, x, hx)[0]
    assert_same_bits([y[:, 0]], [clean[:, 0]])
    expected = PersistentGRU.from_dense(dense, storage=pattern, backend="reference")(x, hx)[0]
    torch.testing.assert_close(y[:, 1].cpu(), expected[:, 1], rtol=0, atol=1e-5, equal_nan=True)
    assert not y.isfinite().all()
    assert_same_bits(run(ours, x, make_input(dense, 2)[1])[:1], [clean])  # nothing of it stays


def test_after_an_exception():
    dense = make_dense(H=40 if INTERPRETED else EXCHANGED)
    ours, (x, hx) = convert(dense), make_input(dense, 2)
    first = run(ours, x, hx)
    for wrong in (x[:, :, 1:], x.double(), x[0, 0, 0]):
        with pytest.raises((RuntimeError, ValueError)):
            ours(wrong.to(DEVICE))
        assert_same_bits(run(ours, x, hx), first)


@PATTERNS
@needs_gpu
def test_a_layer_without_a_named_backend_takes_this_one(pattern):
    dense = make_dense(pattern=pattern)
    ours, (x, hx) = convert(dense, backend=None, storage=pattern), make_input(dense, 2)
    assert ours.chosen_backends() == ["triton"]
    ours.warm_up()
    assert "kernels=" in repr(ours)
    assert_same_bits(run(ours, x, hx), run(convert(dense, storage=pattern), x, hx))


@pytest.mark.parametrize("mode", ["GRU", "LSTM"])
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # inductor uses it
@pytest.mark.filterwarnings("ignore:TensorFloat32")  # inductor recommends it
def test_compile(mode):
    dense = make_dense(mode, num_layers=2)
    ours = convert(dense)
    torch.compiler.reset()
    compiled: Any = torch.compile(ours, fullgraph=True, backend="eager" if INTERPRETED else "inductor")
    for B in (2, 3):
        x, hx = make_input(dense, B)
        assert_same_bits(tensors_of(compiled(moved(x, DEVICE), moved(hx, DEVICE))), run(ours, x, hx))


@needs_gpu
@pytest.mark.parametrize("H", [SMALL, EXCHANGED])
@pytest.mark.parametrize("threads", [False, True])
def test_several_streams_at_once(H, threads):
    dense = make_dense(H=H)
    ours = convert(dense)
    inputs = [make_input(dense, 1 + i % 3, 200, seed=i) for i in range(8)]
    expected = [run(ours, x, hx) for x, hx in inputs]
    torch.cuda.synchronize()

    def run_in_stream(i: int) -> list[Tensor]:
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [run(ours, *inputs[i]) for _ in range(5)]
        torch.cuda.synchronize()
        for result in results[1:]:
            assert_same_bits(result, results[0])
        return results[0]

    with ThreadPoolExecutor(8 if threads else 1) as pool:
        found = list(pool.map(run_in_stream, range(len(inputs))))
    for result, right in zip(found, expected, strict=True):
        assert_same_bits(result, right)


@needs_gpu
def test_streams_from_one_thread_overlap_without_harm():
    dense = make_dense(H=EXCHANGED)
    ours = convert(dense)
    x, hx = (moved(value, DEVICE) for value in make_input(dense, 1, 500))
    expected = tensors_of(ours(x, hx))
    torch.cuda.synchronize()
    found = []
    for stream in [torch.cuda.Stream() for _ in range(4)] * 5:
        with torch.cuda.stream(stream):
            found.append(tensors_of(ours(x, hx)))
    torch.cuda.synchronize()
    for result in found:
        assert_same_bits(result, expected)


@PATTERNS
@needs_gpu
@pytest.mark.parametrize("H", [SMALL, EXCHANGED], ids=["small", "exchanged"])
@pytest.mark.parametrize("mode", ["GRU", "LSTM", "RNN_TANH"])
def test_graph_capture_and_replay(mode, H, pattern):
    dense = make_dense(mode, H, num_layers=2, pattern=pattern)
    ours = convert(dense, storage=pattern)
    x, hx = (moved(value, DEVICE) for value in make_input(dense, 1, 200))
    ours(x, hx)  # compiles kernels and arranges weights
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tensors_of(ours(x, hx))
    for seed in range(2, 8):
        other_x, other_hx = make_input(dense, 1, 200, seed)
        x.copy_(other_x)
        for state, other in zip(tensors_of(hx), tensors_of(other_hx), strict=True):
            state.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(captured, run(ours, other_x, other_hx))


@needs_gpu
def test_a_captured_step():
    dense = make_dense(H=EXCHANGED)
    ours = convert(dense)
    ours.warm_up()
    x, hx = (moved(value, DEVICE) for value in make_input(dense, 1, 1))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, end = ours.step(x[0], hx)
    for _ in range(3):
        wanted = tensors_of(ours.step(x[0], hx))
        graph.replay()
        assert_same_bits([y, end], wanted)
        hx.copy_(end)


@needs_gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_capture_before_the_weights_are_prepared_is_refused():
    ours = convert(make_dense())
    x = torch.zeros(2, 1, SMALL, device=DEVICE)
    with pytest.raises(RuntimeError, match="before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ours(x)
    torch.cuda.synchronize()
    assert ours(x)[0].isfinite().all()


@needs_gpu
def test_a_wait_that_fails_is_told_at_the_next_call():
    dense = make_dense(H=EXCHANGED)
    ours, (x, hx) = convert(dense), make_input(dense, 1)
    right = run(ours, x, hx)
    assert ours._plan is not None
    loop = ours._plan.layers[0]._layer.time_loop
    before, loop.spin_limit = loop.spin_limit, 1
    y = run(ours, x, hx)[0]  # ends, and raises nothing yet
    torch.cuda.synchronize()
    assert y.isnan().any()
    loop.spin_limit = before
    with pytest.raises(RuntimeError, match="an earlier call of this layer gave up"):
        run(ours, x, hx)
    assert_same_bits(run(ours, x, hx), right)  # told once


@needs_gpu
def test_calls_leave_no_memory_behind():
    dense = make_dense(H=EXCHANGED)
    ours, (x, hx) = convert(dense), make_input(dense, 2)
    held = []
    for _ in range(6):
        run(ours, x, hx)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert len(set(held[1:])) == 1


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("H", [SMALL, EXCHANGED])
def test_a_second_device(H):
    dense = make_dense(H=H)
    x, hx = make_input(dense, 2)
    first, second = (convert(dense, device=torch.device("cuda", index)) for index in (0, 1))
    assert_same_bits([t.cpu() for t in run(second, x, hx)], [t.cpu() for t in run(first, x, hx)])
    assert torch.cuda.current_device() == 0
    assert_right(run(first.to("cuda:1"), x, hx), dense, x, hx)
