import warnings
from typing import Any

import pytest
import torch
from torch import nn

from triton_sparse_rnn import to_sparse
from triton_sparse_rnn.kernels.cpu import support
from triton_sparse_rnn.nn import advice
from triton_sparse_rnn.nn.advice import break_even_text, warn_if_dense, warn_if_slow
from triton_sparse_rnn.nn.storage import store_weights
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.patterns import Blocks


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (
            lambda i, j: i >= 0,
            r"weight_x is 0% zeros and 100% of the units of Blocks\(rows=4, columns=2\) .* dense product; prune it",
        ),
        (
            lambda i, j: i % 3 == 0,
            r"62% zeros and 100% .*not where they can be skipped: prune it first, with pattern=Picks\(",
        ),
        (
            lambda i, j: (i + j) % 3 == 0,
            r"67% zeros and 100% .* dense product; to skip its zeros would take longer: prune more of it",
        ),
        (lambda i, j: i < 4, None),
        (lambda i, j: i < 0, None),
    ],
)
def test_little_to_skip_is_said(kept, message, monkeypatch):
    monkeypatch.setattr(support, "vectors", lambda: "AVX-512")
    i, j = torch.meshgrid(torch.arange(8), torch.arange(6), indexing="ij")
    weight = kept(i, j).float()
    density = BlockMatrix.from_dense(weight, (4, 2)).density
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_dense("weight_x", weight, Blocks(4, 2), density)
    assert len(caught) == (message is not None)
    if message:
        with pytest.warns(UserWarning, match=message):
            warn_if_dense("weight_x", weight, Blocks(4, 2), density)
        with pytest.warns(UserWarning, match="it stays dense and runs as a dense matrix product; "):
            warn_if_dense("weight_x", weight, Blocks(4, 2), density, kept_dense=True)


@pytest.mark.parametrize(
    ("vectors", "backend", "advised"),
    [
        ("AVX-512", None, "Picks"),
        ("AVX-512 with bytes", "cpu", "Picks"),
        ("none", None, "Picks"),
        ("AVX2", None, "Blocks"),
        ("generic", "cpu", "Blocks"),
        ("AVX2", "triton", "Picks"),
    ],
)
def test_what_is_advised_runs_fast_there(vectors, backend, advised, monkeypatch):
    monkeypatch.setattr(support, "vectors", lambda: vectors)
    with pytest.warns(UserWarning, match=rf"; prune it first, with pattern={advised}\(rows=16,"):
        warn_if_dense("weight_x", torch.ones(32, 8), Blocks(16, 1), 1.0, backend=backend)


def test_zeros_that_only_picks_skip_are_to_be_stored_in_picks(monkeypatch):
    monkeypatch.setattr(support, "vectors", lambda: "AVX-512")
    layer = nn.LSTM(4, 48)
    torch.manual_seed(0)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        weight = layer.get_parameter(name)
        weight.data *= torch.rand_like(weight) < 0.1
    with pytest.warns(
        UserWarning, match=r"not where they can be skipped: leave out storage, and it is stored in picks"
    ):
        to_sparse(layer, storage=(16, 1))
    in_rows = torch.eye(16).repeat(1, 4)  # whole rows would have to be skipped
    in_rows[0] = 1
    with pytest.warns(UserWarning, match=r"not where they can be skipped: prune it first, with pattern=Blocks\("):
        warn_if_dense("weight_x", in_rows, Blocks(16, 1), 1.0, named=Blocks(16, 1))


def test_break_even_is_said_per_engine_and_size(monkeypatch):
    monkeypatch.setattr(advice, "BREAK_EVEN_MACHINE", "a machine")
    monkeypatch.setattr(advice, "BREAK_EVEN_ZEROS", {"nn.GRU": {8: 0, 16: 0.125}, "y": {8: 0.5}})
    assert break_even_text() == (
        "A GRU layer on the CPU breaks even with nn.GRU at 0% zeros for H 8, 12% zeros for H 16; "
        "with y at 50% zeros for H 8: a machine."
    )


def test_a_layer_without_a_kernel_is_named_with_the_reason():
    with pytest.warns(
        UserWarning,
        match=r"backend 'reference', .* 'triton' cannot run it because of x\. backend='reference' asks for this",
    ):
        warn_if_slow("triton", "of x")


@pytest.mark.parametrize(
    ("cell", "options", "reason"),
    [
        (nn.LSTM, {"weight_dtype": torch.float64}, "weight_ih is stored as torch.float64"),
        (nn.GRU, {"weight_dtype": torch.float64}, "weight_ih is stored as torch.float64"),
        (nn.GRU, {}, None),
        (nn.LSTM, {"storage": (3, 1)}, None),
        (nn.LSTM, {"weight_dtype": torch.float64, "backend": "reference"}, None),
        (nn.GRU, {"backend": "cpu"}, None),
    ],
)
def test_a_fall_back_to_the_reference_is_said_unless_asked_for(cell, options, reason):
    given: dict[str, Any] = {"storage": (4, 1), **options}
    layer = cell(4, 12).requires_grad_(False)
    for weight in (layer.weight_ih_l0, layer.weight_hh_l0):
        weight[:, 1:] = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        to_sparse(layer, **given)
    said = [str(warning.message) for warning in caught]
    assert len(said) == (reason is not None), said
    if reason:
        assert said[0].startswith("the layer will run on backend 'reference', plain torch")
        assert reason in said[0]


@pytest.mark.parametrize(("input_size", "warns"), [(2, False), (3, True)])
def test_of_a_dense_input_weight_of_few_columns_nothing_is_said(input_size, warns):
    layer = nn.GRU(input_size, 32)
    with torch.no_grad():
        layer.get_parameter("weight_hh_l0")[:, 3:] = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        store_weights(layer, torch.float32, None)
    assert [str(warning.message)[:12] for warning in caught] == ["weight_ih_l0"] * warns
