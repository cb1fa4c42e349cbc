"""Pairs of a layer of torch.nn and ours with a gate_gradient that zeroes nothing, and calls of them."""

from typing import Any

import pytest
import torch
from layer_pairs import B, H, I, T, identify, tensors_of
from rounding import rounding_of_sums, terms_of
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from triton_sparse_rnn import GateGradientSparsity, SparseGRU, SparseLSTM

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


cells = pytest.mark.parametrize(("dense_class", "sparse_class"), CELLS, ids=identify)
layers = pytest.mark.parametrize(("dense_class", "sparse_class", "options"), LAYERS, ids=identify)


def make_pair(dense_class: Any, sparse_class: Any, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """A layer of torch.nn, and ours of the same weights in which nothing becomes zero."""
    torch.manual_seed(0)
    dense = dense_class(I, H, **(options or {}))
    sparse = sparse_class(I, H, **(options or {}), gate_gradient=NOTHING)
    sparse.load_state_dict(dense.state_dict(), strict=True)
    return dense, sparse


def rounding_of(layer: Any, dtype: torch.dtype) -> float:
    """How far results and gradients of a call may be from others that are as right, as a share of their size.

    At every step there are the sums of all layers, and on the way back those of as many gates in each; in the end there
    are the rows of all steps. Sums are float32 or wider.
    """
    gates = sum(len(weight) for name, weight in layer.named_parameters() if "weight_hh" in name)
    terms = T * (terms_of(layer) + gates) + T * B
    return 4 * torch.finfo(dtype).eps + rounding_of_sums(terms, torch.promote_types(dtype, torch.float32))


def has_other_operands(layer: Any, form: str) -> bool:
    """Whether torch.nn's input projection is given an x whose rows do not lie one behind the other, as ours never is.

    torch adds the bias after such a product. oneDNN is given a copy by both, and a packed x has such rows.
    """
    takes_onednn = layer.mode == "LSTM" and layer.weight_ih_l0.dtype == torch.float32 and not layer.proj_size
    is_apart = form == "strided" or (layer.batch_first and not form.startswith(("packed", "unbatched")))
    return is_apart and layer.bias and not (takes_onednn and torch.backends.mkldnn.is_available())


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
