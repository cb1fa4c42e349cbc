"""What the tests of the persistent modules share: pruned layers, and each backend with what it runs."""

import math
import multiprocessing
from typing import Any

import pytest
import torch
from rounding import assert_same_sums, rounding_of_sums, terms_of
from torch import nn

from triton_sparse_rnn.kernels.triton.exchange import INTERPRETED
from triton_sparse_rnn.nn.persistent_module import PERSISTENT_CLASSES
from triton_sparse_rnn.sparse.blocks import count_blocks, expand_block_mask

BLOCK_SIZE = (4, 1)
CELLS = [nn.RNN, nn.GRU, nn.LSTM]
CELLS_AND_BACKENDS = [(cell, backend) for cell in CELLS for backend in ("reference", "cpu")]
every_cell_on_the_cpu = pytest.mark.parametrize(("cell", "backend"), CELLS_AND_BACKENDS)
# Without its interpreter "triton" takes no tensors on the CPU; with it one cell must do, as it takes its time.
INTERPRETED_CELLS = [(nn.LSTM, "triton")] if INTERPRETED else []
every_cell_and_backend = pytest.mark.parametrize(("cell", "backend"), CELLS_AND_BACKENDS + INTERPRETED_CELLS)
# For what no cell does in a way of its own.
each_backend = pytest.mark.parametrize(
    ("cell", "backend"), [(nn.RNN, "reference"), (nn.GRU, "cpu"), *INTERPRETED_CELLS]
)


def make_pruned(cell: type[nn.RNNBase], *sizes: int, **options: Any) -> Any:
    """A layer in eval mode with two thirds of the blocks of every matrix zeroed; seeds the random numbers."""
    torch.manual_seed(0)
    build: Any = cell
    layer = build(*(sizes or (5, 7)), **options).eval().requires_grad_(False)
    gates = {nn.RNN: 1, nn.GRU: 3, nn.LSTM: 4}[cell]
    for name, weight in layer.named_parameters():
        if name.startswith(("weight_ih", "weight_hh")):
            H, columns = len(weight) // gates, weight.shape[1]
            grid = (gates, *count_blocks(H, columns, BLOCK_SIZE))
            keep = (torch.arange(math.prod(grid)) % 3 == 1).view(grid)
            weight.masked_fill_(~expand_block_mask(keep, BLOCK_SIZE, H, columns).flatten(0, 1), 0)
    return layer


def convert(layer: nn.RNNBase, backend: str | None = "reference", **options: Any) -> Any:
    cls: Any = next(ours for dense, ours in PERSISTENT_CLASSES.items() if isinstance(layer, dense))
    given: dict[str, Any] = {"backend": backend, "storage": BLOCK_SIZE, **options}
    return cls.from_dense(layer, **given)


def make_states(layer: Any, B: int | None, dtype: torch.dtype = torch.float32) -> Any:
    """An hx for `layer`, of a batch or, for B None, unbatched."""
    layers = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = [layer.proj_size or layer.hidden_size, layer.hidden_size]
    states = [torch.randn(layers, *([] if B is None else [B]), size).to(dtype) for size in sizes]
    return tuple(states) if layer.mode == "LSTM" else states[0]


def tensors_of(result: Any) -> list[torch.Tensor]:
    """The tensors in what a layer returned, outputs first."""
    if isinstance(result, nn.utils.rnn.PackedSequence):
        return [result.data]
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in tensors_of(part)]


def run_after_fork(module: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """What a forked process gets."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=lambda: queue.put([t.numpy() for t in tensors_of(module(x))]))
    process.start()
    forked = queue.get(timeout=30)
    process.join(10)
    assert process.exitcode == 0
    return [torch.from_numpy(array) for array in forked]


def assert_same_bits(ours: Any, theirs: Any) -> None:
    for a, b in zip(tensors_of(ours), tensors_of(theirs), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def assert_backends_agree_on_nan_and_infinity(layer: Any, **options: Any) -> None:
    """Some in x, some in a state, of a GRU of two layers and two directions."""
    x, hx = torch.randn(6, 3, layer.input_size), torch.randn(4, 3, layer.hidden_size)
    clean = torch.randn(6, 3, layer.input_size)
    x[1, 0, 2], x[3, 1, 0], x[0, 2, -1] = float("nan"), float("inf"), -float("inf")
    hx[2, 1, 3] = float("nan")
    for arguments in ((x,), (x, hx), (clean, hx)):
        ours, theirs = (tensors_of(convert(layer, name, **options)(*arguments)) for name in ("cpu", "reference"))
        assert_same_sums(ours, theirs, terms_of(layer))


def assert_as_exact_as_nn(ours: Any, dense: nn.RNNBase, input: Any, hx: Any = None) -> None:
    """Ours is within 4 times the error of torch.nn's own result, both taken against float64, plus some roundings.

    They are 4 of the dtype, of the functions behind the sums and of the result, and those of sums, which are float32 or
    wider: torch.nn may happen to be exact.
    """
    theirs = tensors_of(dense(input, hx))
    dtype = theirs[0].dtype
    rounding = 4 * torch.finfo(dtype).eps + rounding_of_sums(terms_of(dense), torch.promote_types(dtype, torch.float32))
    try:
        exact = tensors_of(dense.double()(*_to_double(input, hx)))
    finally:
        dense.to(dtype)
    for a, b, e in zip(tensors_of(ours), theirs, exact, strict=True):
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)
        budget = 4 * (b - e).abs().amax() + rounding * e.abs().amax().clamp(min=1) if a.numel() else 0
        assert ((a - e).abs() <= budget).all()


def _to_double(input: Any, hx: Any) -> tuple[Any, Any]:
    hx = tuple(h.double() for h in hx) if isinstance(hx, (tuple, list)) else None if hx is None else hx.double()
    return input.to(torch.float64), hx
