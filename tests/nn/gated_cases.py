"""Pairs of a layer of torch.nn and ours with a gate_gradient that zeroes nothing, and calls of them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from triton_sparse_rnn import GateGradientSparsity, SparseGRU, SparseLSTM

T, B, I, H = 5, 3, 4, 7
CELLS: list[Any] = [(nn.LSTM, SparseLSTM), (nn.GRU, SparseGRU)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False, "batch_first": True},
    {"bidirectional": True, "num_layers": 2},
    {"num_layers": 3, "dropout": 0.4, "batch_first": True, "bias": False},
    {"num_layers": 2, "dropout": 0.4, "bidirectional": True},
    {"dtype": torch.float64, "bidirectional": True},
    {"dtype": torch.float16},
    {"dtype": torch.bfloat16, "num_layers": 2},
]
LAYERS = [(*cell, options) for cell in CELLS for options in OPTIONS] + [
    (nn.LSTM, SparseLSTM, {"proj_size": 3, "num_layers": 2, "bidirectional": True, "batch_first": True}),
    (nn.LSTM, SparseLSTM, {"proj_size": 2, "bias": False}),
]
FORMS = ["batched", "state", "list", "one step", "one row", "unbatched", "unbatched state", "strided"]
PACKED_FORMS = ["packed", "packed state", "packed unsorted", "packed unsorted state"]
NOTHING = GateGradientSparsity(threshold=0.0, backend="reference")


def _identify(value):
    return value.__name__ if isinstance(value, type) else str(value)


cells = pytest.mark.parametrize(("dense_class", "sparse_class"), CELLS, ids=_identify)
layers = pytest.mark.parametrize(("dense_class", "sparse_class", "options"), LAYERS, ids=_identify)


def make_pair(dense_class: Any, sparse_class: Any, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """A layer of torch.nn, and ours of the same weights in which nothing becomes zero."""
    torch.manual_seed(0)
    dense = dense_class(I, H, **(options or {}))
    sparse = sparse_class(I, H, **(options or {}), gate_gradient=NOTHING)
    sparse.load_state_dict(dense.state_dict(), strict=True)
    return dense, sparse


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor of a call's result, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [] if value is None else [tensor for part in value for tensor in tensors_of(part)]


def assert_same(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    ours, theirs = tensors_of(actual), tensors_of(expected)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert torch.equal(one, other)


def random_state(layer: Any, batch: tuple[int, ...]) -> Any:
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    h, c = torch.randn(rows, *batch, layer.proj_size or H), torch.randn(rows, *batch, H)
    return (h, c) if layer.mode == "LSTM" else h


def make_call(layer: Any, form: str, dtype: torch.dtype) -> tuple[list[Tensor], Any, Any]:
    """The leaves of a call in `dtype`, and its input and state, made of them; numbers depend on the form alone."""
    torch.manual_seed(7)
    lengths = (2, 5, 1) if "unsorted" in form else (5, 2, 2)
    if form.startswith("packed"):
        x = [torch.randn(length, I) for length in lengths]
    elif form.startswith("unbatched"):
        x = [torch.randn(T, I)]
    else:
        shape = {"one step": (1, B), "one row": (T, 1)}.get(form, (T, B))
        x = [torch.randn(*reversed(shape), I) if layer.batch_first else torch.randn(*shape, I)]
    state = None
    if form == "state" or form == "list" or form == "strided" or form.endswith(" state"):
        state = random_state(layer, () if form.startswith("unbatched") else (B,))
    leaves = [tensor.to(dtype).requires_grad_() for tensor in [*x, *tensors_of(state)]]
    rows, states = leaves[: len(x)], leaves[len(x) :]
    given: Any = pack_sequence(rows, enforce_sorted="unsorted" not in form) if "packed" in form else rows[0]
    if form == "strided":
        given = given.repeat_interleave(2, dim=-1)[..., ::2]
        states = [one.transpose(0, 1).contiguous().transpose(0, 1) for one in states]
    hx = None if state is None else states[0] if layer.mode == "GRU" else states if form == "list" else tuple(states)
    return leaves, given, hx


def run(layer: Any, form: str, dtype: torch.dtype) -> tuple[Any, list[Tensor]]:
    """The result of a call, and the gradients of all that goes in."""
    leaves, given, hx = make_call(layer, form, dtype)
    torch.manual_seed(4)  # of dropout
    result = layer(given, hx)
    outputs = [tensor for tensor in tensors_of(result) if tensor.requires_grad]
    arriving = [torch.randn(one.shape, generator=torch.Generator().manual_seed(k)) for k, one in enumerate(outputs)]
    torch.autograd.backward(outputs, [one.to(dtype) for one in arriving])
    gradients = [tensor.grad for tensor in [*leaves, *layer.parameters()]]
    assert all(gradient is not None for gradient in gradients)
    return result, gradients  # type: ignore[return-value]


def error(actual: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [
        float((one.double() - other).norm() / other.norm().clamp(min=1e-30))
        for one, other in zip(actual, exact, strict=True)
    ]
