import pytest
import torch

from triton_sparse_rnn.errors import BackendUnavailableError
from triton_sparse_rnn.ops.backends import triton
from triton_sparse_rnn.ops.dispatch import BACKENDS, check_backend, choose_backend, unavailable_reason
from triton_sparse_rnn.ops.layer_weights import LayerWeights, StoredLayer
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix


def make_weights(block_size=(4, 1), dtype=torch.float32):
    matrix = BlockMatrix.from_dense(torch.eye(24)[:, :8], block_size, gates=3, dtype=dtype)
    return [LayerWeights(matrix, matrix, None, None)]


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("mode", "dtype", "device", "weights", "chosen"),
    [
        ("GRU", torch.float32, CPU, make_weights(), "cpu"),
        ("GRU", torch.float64, CPU, make_weights(), "reference"),
        ("GRU", torch.float32, torch.device("meta"), make_weights(), "reference"),
        ("GRU", torch.float32, CPU, make_weights((3, 2)), "cpu"),
        ("GRU", torch.float32, CPU, make_weights(dtype=torch.int8), "cpu"),
        ("GRU", torch.float32, CPU, make_weights(dtype=torch.float64), "reference"),
        ("GRU", torch.bfloat16, CPU, make_weights(dtype=torch.bfloat16), "cpu"),
        ("LSTM", torch.float32, CPU, make_weights(), "cpu"),
        ("RNN_TANH", torch.float32, CPU, make_weights(), "cpu"),
    ],
)
def test_the_fastest_that_fits(mode, dtype, device, weights, chosen):
    layer = StoredLayer(mode, weights, dtype, device)
    assert choose_backend(None, layer) == chosen
    assert choose_backend("reference", layer) == "reference"
    if chosen == "cpu":
        assert choose_backend("cpu", layer) == "cpu"
    else:
        with pytest.raises(BackendUnavailableError, match=r"'cpu' cannot run this layer: .* backend=None takes"):
            choose_backend("cpu", layer)


@pytest.mark.parametrize(
    ("device", "chosen"), [("cuda", "triton"), ("cuda:1", "triton"), ("cpu", "cpu"), ("meta", "reference")]
)
def test_only_cuda_tensors_take_triton_by_themselves(monkeypatch, device, chosen):
    """Triton's interpreter, which would run this layer on the CPU, is taken by name alone."""
    if device.startswith("cuda"):
        monkeypatch.setattr(triton, "unsupported_reason", lambda layer: None)
    assert choose_backend(None, StoredLayer("GRU", make_weights(), torch.float32, torch.device(device))) == chosen


def test_cuda_tensors_that_triton_does_not_take(monkeypatch):
    monkeypatch.setattr(triton, "availability", lambda: "it is gone")
    layer = StoredLayer("GRU", make_weights(), torch.float32, torch.device("cuda"))
    assert choose_backend(None, layer) == "reference"
    with pytest.raises(BackendUnavailableError, match=r"'triton' cannot run this layer: it is gone\. backend=None"):
        choose_backend("triton", layer)


def test_every_available_backend_can_run():
    assert {name for name in BACKENDS if unavailable_reason(name) is None} >= {"cpu", "reference"}


def test_names_of_backends():
    assert [check_backend(name) for name in (None, *BACKENDS)] == [None, *BACKENDS]
    for wrong in ("CPU", "", 3, torch.device("cpu")):
        with pytest.raises(ValueError, match="backend must be None or one of 'triton', 'cpu', 'reference', got"):
            check_backend(wrong)  # type: ignore[arg-type]
