"""The "triton" backend as operators and modules see it; what its kernels compute is tested in tests/kernels/triton."""

import gc
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from triton_sparse_rnn.errors import BackendUnavailableError
from triton_sparse_rnn.kernels.triton import exchange, recurrent_layer
from triton_sparse_rnn.nn.persistent import PersistentGRU, PersistentRNN
from triton_sparse_rnn.ops.backends import triton
from triton_sparse_rnn.ops.layer_weights import LayerWeights, StoredLayer
from triton_sparse_rnn.ops.validation import check_not_capturing
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.picks import Picks

DEVICE = torch.device("cpu" if exchange.INTERPRETED else "cuda")
OTHER_DEVICE = torch.device("cuda" if exchange.INTERPRETED else "cpu")
I, H = 3, 5


def make_weights(dtype: torch.dtype = torch.float32, **changes: Any) -> LayerWeights:
    """A GRU's direction in which every unit reads the first input and the first unit."""
    ih, hh = (
        BlockMatrix.from_dense(
            torch.randn(3 * H, size).mul(torch.arange(size) < 1).to(DEVICE), (4, 1), gates=3, dtype=dtype
        )
        for size in (I, H)
    )
    biases: list[Any] = [torch.randn(3 * H, device=DEVICE) for _ in range(2)]
    return LayerWeights(ih, hh, biases[0], biases[1])._replace(**changes)


@pytest.fixture(autouse=True)
def _exact(monkeypatch) -> None:
    """Let nn.GRU, which results are compared with, be as exact on a GPU as on a CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def made(monkeypatch) -> list[Any]:
    """The layers that are brought into the order of the kernels from now on."""
    layers: list[Any] = []

    class Noted(recurrent_layer.RecurrentLayer):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            layers.append(weakref.ref(self))

    monkeypatch.setattr(recurrent_layer, "RecurrentLayer", Noted)
    return layers


def prepare(directions: list[LayerWeights], mode: str = "GRU") -> Any:
    return triton.prepare_layer(StoredLayer(mode, directions, torch.float32, DEVICE), 1)


def make_gru(num_layers: int = 1) -> Any:
    torch.manual_seed(0)
    dense = nn.GRU(I, H, num_layers).requires_grad_(False)
    for name, weight in dense.named_parameters():
        if name.startswith("weight"):
            weight[:, 1:] = 0
    return dense.to(DEVICE)


def convert(dense: Any, **options: Any) -> Any:
    given: dict[str, Any] = {"backend": "triton", "storage": (4, 1), **options}
    return PersistentGRU.from_dense(dense, **given)


def test_why_it_cannot_run_on_a_machine(monkeypatch):
    def available() -> str:
        return triton.availability.__wrapped__() or "it can"

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "triton_sparse_rnn.kernels.triton.exchange", None)
        assert available().startswith("Triton cannot be imported: ")
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "7.0")
        assert "this torch is built for AMD GPUs, where Triton makes plain loads" in available()
    monkeypatch.setattr(exchange, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert available() == "there is no CUDA device that torch can use"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for capabilities, reason in (
        ([(7, 5), (7, 0)], "it needs a GPU of compute capability 8.0 or newer, cuda:0 has 7.5"),
        ([(7, 5), (8, 0)], "it can"),
        ([(10, 0), (7, 5)], "it can"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capabilities: c[device.index])
        assert available() == reason
    monkeypatch.setattr(exchange, "INTERPRETED", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert available() == "it can"


INT8 = BlockMatrix.from_dense(torch.eye(H).repeat(3, 1), (4, 1), gates=3, dtype=torch.int8)
PICKED = BlockMatrix.from_dense(torch.eye(H).repeat(3, 1), Picks(), gates=3)
WIDE, NARROW_WIDE = (
    BlockMatrix.from_dense(torch.zeros(3 * H, 65_536), Picks(), gates=3, dtype=dtype)
    for dtype in (torch.float32, torch.float16)
)
DOUBLE = BlockMatrix.from_dense(torch.eye(H).repeat(3, 1), (4, 1), gates=3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"device": OTHER_DEVICE}, "tensors on (the CPU|a CUDA device)[;,] these are on "),
        ({"device": torch.device("meta")}, "these are on meta"),
        ({"dtype": torch.float64}, "it computes in float32, the layer's dtype is torch.float64"),
        ({"dtype": torch.bfloat16}, None),
        ({"activation_dtype": torch.int8}, "it does not quantise activations, and activation_dtype is torch.int8"),
        ({"directions": [make_weights(), make_weights(weight_hr=DOUBLE)]}, "proj_size, .* two exchanges"),
        ({"directions": [make_weights(weight_hh=INT8)]}, "weight_hh is stored as torch.int8, and only torch.float32, "),
        ({"directions": [make_weights(weight_ih=DOUBLE)]}, "weight_ih is stored as torch.float64, and only"),
        ({"directions": [make_weights(weight_ih=torch.zeros(3 * H, I))]}, None),
        ({"directions": [make_weights(torch.float16)]}, None),
        ({"directions": [make_weights(weight_ih=PICKED, weight_hh=PICKED)]}, None),
        ({"directions": [make_weights(weight_ih=WIDE)]}, None),
        (
            {"directions": [make_weights(weight_ih=NARROW_WIDE)]},
            "weight_ih has 65,536 columns, and picks of torch.float16 ",
        ),
        ({"directions": [make_weights(torch.bfloat16)]}, None),
    ],
)
def test_why_it_cannot_run_a_layer(change, reason):
    found = triton.unsupported_reason(StoredLayer("GRU", [make_weights()], torch.float32, DEVICE)._replace(**change))
    if reason is None:
        assert found is None
    else:
        assert found is not None
        with pytest.raises(BackendUnavailableError, match=reason):
            raise BackendUnavailableError(found)


def test_an_old_gpu_beside_a_new_one(monkeypatch):
    monkeypatch.setattr(exchange, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(7, 5), (9, 0)][device.index])
    layers = [StoredLayer("GRU", [make_weights()], torch.float32, torch.device("cuda", i)) for i in (0, 1)]
    reasons = [*map(triton.unsupported_reason, layers)]
    assert reasons == ["it needs a GPU of compute capability 8.0 or newer, cuda:0 has 7.5", None]


def test_a_block_of_fewer_than_16_rows_reads_its_input_for_16_units():
    dense: Any = nn.RNN(8, 20, nonlinearity="relu").requires_grad_(False)
    for weight in (dense.weight_ih_l0, dense.weight_hh_l0):
        weight.zero_()[4:8, 1] = 1
    x = torch.full((1, 1, 8), float("nan"), device=DEVICE)
    y = PersistentRNN.from_dense(dense.to(DEVICE), backend="triton", storage=(4, 1))(x)[0]
    assert y.isnan().flatten().nonzero().flatten().tolist() == [*range(16)]


def test_prepared_once_for_the_same_tensors(made):
    weights, other = make_weights(), make_weights()
    layer = prepare([weights])
    assert prepare([weights._replace()]) is layer
    assert len(made) == 1
    for directions in (
        [weights, other],
        [weights],
        [weights._replace(bias_hh=other.bias_hh)],
        [weights._replace(bias_hh=None)],
        [weights._replace(weight_ih=other.weight_ih)],
        [weights],
    ):
        assert not layer.is_made_from("GRU", directions) or directions == [weights]
        prepare(directions)
    assert len(made) == 1 + 6
    assert not layer.is_made_from("LSTM", [weights])


def test_writes_are_followed(made):
    weights = make_weights()
    layer, x, states = prepare([weights]), torch.randn(4, I, device=DEVICE), [torch.zeros(1, 2, H, device=DEVICE)]
    before = layer(x, states, None)
    assert torch.equal(layer(x, states, None)[0], before[0])
    assert len(made) == 1
    assert isinstance(weights.weight_ih, BlockMatrix)
    for written in (weights.bias_ih, weights.weight_ih.values, weights.weight_hh.values):
        assert written is not None
        count = len(made)
        with torch.inference_mode():
            written.mul_(2)
        after = layer(x, states, None)
        assert len(made) == count + 1
        assert not torch.equal(after[0], before[0])
        fresh = triton.PreparedLayer("GRU", [weights])(x, states, None)
        assert torch.equal(after[0], fresh[0])
        before = after


def test_prepared_layers_die_with_the_weights(made):
    weights = make_weights()
    prepare([weights])
    assert len(triton._PREPARED) >= 1
    gc.collect()
    assert made[0]() is not None
    del weights
    gc.collect()
    assert made[0]() is None


def test_weights_without_a_counter_of_writes(made):
    with torch.inference_mode():
        weights = make_weights()
        layer = prepare([weights])
    layer(torch.randn(4, I, device=DEVICE), [torch.zeros(1, 2, H, device=DEVICE)], None)
    assert len(made) == 1
    prepare([weights])
    assert len(made) == 2  # anew for whoever asks: they may have been written to


def test_modules_and_operators_share_what_is_prepared(made):
    ours = convert(make_gru(num_layers=2))
    ours.warm_up()
    assert len(made) == 2
    x = torch.randn(2, 1, I, device=DEVICE)
    expected = ours(x)[0]
    torch.compiler.reset()
    for backend in ("eager", "aot_eager"):
        compiled: Any = torch.compile(ours, fullgraph=True, backend=backend)
        assert torch.equal(compiled(x)[0], expected)
    assert torch.equal(ours(x.requires_grad_())[0], expected)
    assert len(made) == 2
    ours.load_state_dict(ours.state_dict())
    ours(x.detach())
    assert len(made) == 4  # written to, if with the same numbers


def test_the_first_call_may_be_in_any_mode(made):
    for first in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        ours = convert(make_gru())
        x = torch.randn(2, 1, I, device=DEVICE)
        with first():
            expected = ours(x)[0].clone()
        tensors = [value for value in vars(made[-1]()).values() if isinstance(value, Tensor)]
        assert tensors
        assert not any(tensor.is_inference() for tensor in tensors)  # these cannot be written to in other modes
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
            with mode():
                assert torch.equal(ours(x)[0], expected)


def test_the_repr_says_how_it_runs_once_it_has_run():
    ours = convert(make_gru(num_layers=2))
    assert repr(ours).endswith("backend='triton')")
    ours.warm_up()
    (description,) = ours._plan.descriptions()
    assert "program" in description
    assert repr(ours).endswith(f"backend='triton', kernels={description!r})")
    ours.backend = "reference"
    assert "kernels" not in repr(ours)
    assert "kernels" not in repr(convert(make_gru(), backend="reference"))
    ours.backend = "triton"
    assert repr(ours.to("meta")).endswith("backend='triton')")  # where it cannot run


@pytest.mark.parametrize("capturing", [True, False])
def test_nothing_is_prepared_during_the_capture_of_a_graph(monkeypatch, capturing):
    devices = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: devices.append(device) or torch.no_grad())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    check_not_capturing(torch.device("cpu"))
    if capturing:
        with pytest.raises(RuntimeError, match=r"being captured, .* call it once, .* before the capture"):
            check_not_capturing(torch.device("cuda", 1))
    else:
        check_not_capturing(torch.device("cuda", 1))
    assert devices == [torch.device("cuda", 1)]


def test_captures_are_refused_before_anything_is_read(monkeypatch):
    def refuse(device):
        raise RuntimeError(f"capture on {device.type}")

    ours = convert(make_gru())
    x = torch.randn(2, 1, I, device=DEVICE)
    for module in ("triton_sparse_rnn.nn.plan", "triton_sparse_rnn.ops.backends.triton"):
        with monkeypatch.context() as patch:
            patch.setattr(f"{module}.check_not_capturing", refuse)
            with pytest.raises(RuntimeError, match=f"capture on {DEVICE.type}"):
                ours(x)
        assert ours._plan is None
    ours(x)
    monkeypatch.setattr("triton_sparse_rnn.nn.plan.check_not_capturing", refuse)
    monkeypatch.setattr("triton_sparse_rnn.ops.backends.triton.check_not_capturing", refuse)
    ours(x)


@pytest.fixture
def fake_cuda() -> Any:
    """A mode in which CUDA tensors exist, and hold nothing, on any machine."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def to_fake(module: Any, mode: FakeTensorMode) -> Any:
    """Put a module on a GPU that is not there; `module.to` would need a torch built for CUDA."""
    with mode:
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
    return module


@pytest.mark.parametrize("backend", [None, "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_cuda_tensors_in_a_call(fake_cuda, backend, dtype):
    ours = to_fake(convert(make_gru(num_layers=2).to(dtype), backend=backend), fake_cuda)
    with fake_cuda:
        y, h = ours(torch.empty(6, 2, I, device="cuda", dtype=dtype))
        y_t, _ = ours.step(torch.empty(2, I, device="cuda", dtype=dtype))
    assert [tuple(t.shape) for t in (y, h, y_t)] == [(6, 2, H), (2, 2, H), (2, H)]
    assert {(t.device.type, t.dtype) for t in (y, h, y_t)} == {("cuda", dtype)}
    assert ours._plan is None
    assert "PersistentGRU(3, 5, num_layers=2" in repr(ours)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_fake_cuda_tensors(fake_cuda, strict):
    ours = to_fake(convert(make_gru()), fake_cuda)
    axes = {0: torch.export.Dim("T"), 1: torch.export.Dim("B")}
    with fake_cuda:
        sample = torch.empty(6, 2, I, device="cuda")
        exported = torch.export.export(ours, (sample,), dynamic_shapes=(axes,), strict=strict)
    layers = [node for node in exported.graph.nodes if "recurrent_layer" in str(node.target)]
    assert [node.args[6] for node in layers] == ["triton"]
    y, h = layers[0].meta["val"]
    assert (y.device.type, y.shape[1], h.device.type, h.shape[2]) == ("cuda", H, "cuda", H)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_with_fake_cuda_tensors(fake_cuda, backend):
    torch.compiler.reset()
    ours = to_fake(convert(make_gru()), fake_cuda)
    compiled: Any = torch.compile(ours, fullgraph=True, backend=backend)
    with fake_cuda:
        y, h = compiled(torch.empty(6, 2, I, device="cuda"))
    assert [(t.device.type, tuple(t.shape)) for t in (y, h)] == [("cuda", (6, 2, H)), ("cuda", (1, 2, H))]


@pytest.mark.gpu
def test_cuda_tensors_take_it_by_themselves():
    ours = convert(make_gru(num_layers=2), backend=None)
    assert ours.chosen_backends() == ["triton", "triton"]
    assert convert(make_gru().cpu(), backend=None).chosen_backends() == ["cpu"]
    assert ours.cpu().chosen_backends() == ["cpu", "cpu"]
    x = torch.randn(7, 2, I)
    torch.testing.assert_close(ours(x)[0], ours.cuda()(x.cuda())[0].cpu(), rtol=0, atol=3e-6)


def test_layers_of_one_direction_are_prepared_as_a_stack(made):
    dense = make_gru(3)
    fast = convert(dense)
    x, h0 = torch.randn(4, 2, I, device=DEVICE), torch.randn(3, 2, H, device=DEVICE)
    torch.testing.assert_close(fast(x, h0), dense(x, h0))
    (stack,) = fast._plan.layers
    assert isinstance(stack, triton.PreparedStack)
    assert "kernels='3 layers at once: " in repr(fast)
    torch.testing.assert_close(fast.step(x[0], h0)[1], dense(x[:1], h0)[1])
    assert len(made) == 3
    with torch.no_grad():
        fast.get_buffer("weight_hh_l1_values").zero_()
        dense.weight_hh_l1.zero_()
    torch.testing.assert_close(fast(x, h0), dense(x, h0))
    assert len(made) == 4


def test_layers_that_cannot_be_stacked_are_prepared_one_by_one():
    dense = nn.GRU(I, H, 2, bidirectional=True).requires_grad_(False).to(DEVICE)
    with pytest.warns(UserWarning, match="little to skip"):
        fast = convert(dense)
    fast.warm_up()
    assert [type(layer) for layer in fast._plan.layers] == [triton.PreparedLayer] * 2
