"""The Triton backend of gate gradients as a layer uses it: chosen by name, and beside the reference."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from triton_sparse_rnn import GateGradientSparsity, SparseLSTM
from triton_sparse_rnn.gate_gradients.backends.triton import precision_of_cudnn
from triton_sparse_rnn.kernels.triton.exchange import INTERPRETED
from triton_sparse_rnn.kernels.triton.gate_gradients import through_time as gate_gradient_time

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
KINDS: dict[str, dict[str, Any]] = {
    "threshold": {"threshold": 0.02},
    "sampled blocks": {"threshold": 0.02, "structure": "blocks", "units": 4, "rows": 2},
}


@pytest.fixture(autouse=True)
def _exact_and_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def gradients(layer: nn.LSTM, x: Tensor | PackedSequence) -> dict[str, Tensor]:
    y = layer(x)[0]
    (y.data if isinstance(y, PackedSequence) else y).square().sum().backward()
    return {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_gets_the_gradients_of_the_reference(kind: str, packed: bool) -> None:
    layer = SparseLSTM(5, 13, bidirectional=True, device=DEVICE)
    rows = [torch.randn(length, 5, device=DEVICE) for length in ([4, 2, 2] if packed else [3, 3, 3])]
    x = pack_sequence(rows) if packed else torch.stack(rows, dim=1)
    found = []
    for backend in ("triton", "reference"):
        layer.gate_gradient = GateGradientSparsity(backend=backend, **KINDS[kind])
        found.append(gradients(copy.deepcopy(layer), x))
    for name, ours in found[0].items():
        torch.testing.assert_close(ours, found[1][name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_a_backward_after_one_that_gave_up_raises_once() -> None:
    layer = SparseLSTM(3, 4, device=DEVICE, gate_gradient=GateGradientSparsity(threshold=0.1, backend="triton"))
    x = torch.randn(2, 1, 3, device=DEVICE)
    gate_gradient_time.status_of(layer(x)[0].device).fill_(1)
    with pytest.raises(RuntimeError, match="gave up: a program waited for gate gradients"):
        layer(x)[0].sum().backward()
    layer(x)[0].sum().backward()
    assert layer.weight_hh_l0.grad is not None


def test_products_are_as_exact_as_those_of_cudnn() -> None:
    x = torch.zeros(1)
    with precision_of_cudnn(x) as precision:
        assert precision == "tf32x3"
    torch.backends.cudnn.allow_tf32 = True  # given back by the fixture
    with precision_of_cudnn(x) as precision:
        assert precision == "tf32"
    with precision_of_cudnn(x.half()) as precision:
        assert precision == "tf32"


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("allowed", [False, True])
def test_the_setting_of_torch_is_given_back(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allowed
    before = torch.backends.cuda.matmul.fp32_precision
    with precision_of_cudnn(torch.zeros(1, device=DEVICE)):
        assert (torch.backends.cuda.matmul.fp32_precision == "tf32") == allowed
    assert torch.backends.cuda.matmul.fp32_precision == before
