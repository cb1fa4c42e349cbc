"""PersistentLinear and PersistentConv1d in place of the layers that they were made from."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from linear_cases import IN, OUT, assert_close, convert, each_backend, make_linear
from persistent_cases import run_after_fork
from torch import nn
from torch.autograd import forward_ad
from torch.export import Dim

from triton_sparse_rnn import BackendUnavailableError, BlockMatrix, Blocks, PersistentConv1d, PersistentLinear, Picks

KINDS = [nn.Linear, nn.Conv1d]
SHAPES = [(IN,), (1, IN), (5, IN), (2, 3, IN), (2, 0, IN), (1, 2, 3, IN)]


def make_input(kind: type, *shape: int, **options: Any) -> torch.Tensor:
    """[..., IN] for nn.Linear, and for nn.Conv1d [..., IN, T] of two or three axes."""
    return torch.randn(*shape, IN, **options) if kind is nn.Linear else torch.randn(*shape[:1], IN, 4, **options)


@each_backend
@pytest.mark.parametrize("bias", [True, False])
def test_any_leading_axes(backend, bias):
    layer = make_linear(bias=bias)
    ours = convert(layer, backend)
    for _ in range(2):  # the first call prepares, the second one is plain
        for shape in SHAPES:
            x = torch.randn(shape)
            y = ours(x)
            assert y.shape == (*shape[:-1], OUT)
            assert y.is_contiguous()
            assert_close(y, layer(x))


@each_backend
@pytest.mark.parametrize("shape", [(3, IN, 5), (IN, 5), (1, IN, 1), (0, IN, 5)])
def test_an_nn_conv1d_of_kernel_size_1(backend, shape):
    layer = make_linear(kind=nn.Conv1d)
    ours, x = convert(layer, backend), torch.randn(shape)
    y = ours(x)
    assert y.is_contiguous()
    assert_close(y, layer(x))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("storage", [(16, 1), (7, 2), Picks(), Picks(16, 64, 4)], ids=str)
def test_weights_of_every_dtype(storage, weight_dtype):
    layer = make_linear()
    ours = convert(layer, storage=storage, weight_dtype=weight_dtype)
    x = torch.randn(3, IN)
    assert ours.weight.values.dtype == weight_dtype
    assert_close(ours(x), nn.functional.linear(x, ours.weight.to_dense().float(), layer.bias))


@pytest.mark.parametrize("storage", [(16, 4), Picks(16, 64, 4)], ids=str)
def test_quantised_activations(storage):
    layer = make_linear()
    ours, theirs = (
        convert(layer, backend, storage=storage, weight_dtype=torch.int8, activation_dtype=torch.int8)
        for backend in ("cpu", "reference")
    )
    x = torch.randn(5, IN)
    assert_close(ours(x), theirs(x))
    assert_close(ours(x), layer(x), 0.05)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_layers(backend, dtype):
    layer = make_linear(dtype=dtype)
    ours, x = convert(layer, backend), torch.randn(3, IN).to(dtype)
    assert ours(x).dtype == dtype
    wide = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert_close(ours(x).double(), wide, 8 * torch.finfo(dtype).eps)


def test_float64_runs_on_the_reference():
    layer = make_linear(dtype=torch.float64)
    with pytest.warns(UserWarning, match="will run on backend 'reference'.*it computes in float32"):
        ours = convert(layer, None)
    x = torch.randn(3, IN, dtype=torch.float64)
    assert_close(ours(x), layer(x), 1e-13)
    with pytest.raises(BackendUnavailableError, match="backend 'cpu' cannot run this layer"):
        convert(layer, "cpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_to_dense_gives_the_bits_back(kind, bias):
    layer = make_linear(kind=kind, bias=bias)
    dense = convert(layer, storage=Picks()).to_dense()
    assert type(dense) is kind
    assert repr(dense) == repr(layer)
    assert not dense.training
    assert dense.state_dict().keys() == layer.state_dict().keys()
    for name, tensor in layer.state_dict().items():
        assert torch.equal(dense.state_dict()[name], tensor)


def test_weight_and_bias_are_there():
    layer = make_linear()
    ours = convert(layer)
    assert isinstance(ours.weight, BlockMatrix)
    assert ours.weight.values.data_ptr() == ours.weight_values.data_ptr()
    assert torch.equal(ours.bias, layer.bias)
    assert ours.bias.data_ptr() != layer.bias.data_ptr()
    assert (ours.in_features, ours.out_features, ours.dtype, ours.device.type) == (IN, OUT, torch.float32, "cpu")
    assert convert(make_linear(bias=False)).bias is None
    assert [*ours.stored_weights()] == ["weight", "bias"]
    assert ours.nbytes == ours.weight.nbytes + layer.bias.nbytes
    assert ours.density == ours.weight.density
    assert next(ours.parameters()).dtype == torch.float32
    assert not [*ours.named_parameters()]


def test_conv1d_has_channels():
    ours = convert(make_linear(kind=nn.Conv1d))
    assert (ours.in_channels, ours.out_channels) == (IN, OUT)
    assert isinstance(ours, PersistentConv1d)


def test_repr():
    ours = convert(make_linear(), weight_dtype=torch.int8, activation_dtype=torch.int8, num_threads=2)
    assert repr(ours) == (
        f"PersistentLinear(in_features={IN}, out_features={OUT}, bias=True, activation_dtype=torch.int8, "
        f"num_threads=2, density={ours.density:.3f}, storage=Blocks(rows=16, columns=1), weight_dtype=torch.int8, "
        f"nbytes={ours.nbytes}, backend='cpu')"
    )
    assert repr(convert(make_linear(kind=nn.Conv1d, bias=False))).startswith(
        f"PersistentConv1d({IN}, {OUT}, kernel_size=(1,), stride=(1,), bias=False, density="
    )


def refuses_as(layer: Any, ours: Any, x: Any) -> None:
    with pytest.raises((RuntimeError, TypeError)) as theirs:
        layer(x)
    opening = str(theirs.value)[:25]
    for _ in range(2):
        with pytest.raises(theirs.type) as found:
            ours(x)
        assert str(found.value).startswith(opening)
        ours(make_input(type(layer), 2))


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, IN + 1),
        torch.zeros(2, 3, IN - 1),
        torch.zeros(IN + 1),
        torch.tensor(1.0),
        torch.zeros(2, IN, dtype=torch.float64),
        torch.zeros(2, IN, dtype=torch.long),
        [1.0, 2.0],
    ],
    ids=lambda x: str(getattr(x, "shape", x)),
)
def test_wrong_inputs_raise_as_those_of_nn_linear(x):
    layer = make_linear()
    refuses_as(layer, convert(layer), x)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, IN + 1, 3),
        torch.zeros(IN - 1, 3),
        torch.zeros(IN),
        torch.zeros(2, IN, 0),
        torch.zeros(1, 2, IN, 3),
    ],
    ids=lambda x: str(x.shape),
)
def test_wrong_inputs_raise_as_those_of_nn_conv1d(x):
    layer = make_linear(kind=nn.Conv1d)
    refuses_as(layer, convert(layer), x)


def test_inputs_without_numbers_are_refused():
    ours, x = convert(make_linear()), torch.zeros(2, IN)
    ours(x)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="input has no memory for its numbers"):
        ours(x)
    with pytest.raises(RuntimeError, match=r"input must have layout torch.strided"):
        ours(torch.zeros(2, IN).to_sparse())
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        ours(torch.zeros(2, IN, device="meta"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backend": "gpu"}, ValueError, "backend must be None or one of"),
        ({"storage": (0, 1)}, ValueError, "storage must be at least"),
        ({"storage": Blocks(16, 10000)}, ValueError, "storage"),
        ({"weight_dtype": torch.int16}, ValueError, "weight_dtype must be one of"),
        ({"activation_dtype": torch.int8}, ValueError, "activation_dtype=torch.int8 needs weights in"),
        ({"num_threads": 0}, ValueError, "num_threads must be at least 1"),
        ({"speed": 1}, TypeError, "PersistentLinear.from_dense.. got an unexpected keyword argument 'speed'"),
    ],
)
def test_wrong_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        convert(make_linear(), **options)


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (nn.GRU(2, 3), TypeError, "takes a layer of class nn.Linear, got GRU"),
        (nn.Linear(3, 4, device="meta"), ValueError, "weight is on the meta device"),
    ],
)
def test_other_layers_are_refused(layer, error, message):
    with pytest.raises(error, match=message):
        PersistentLinear.from_dense(layer)


def test_other_convolutions_are_refused():
    for conv in (nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 1, stride=2), nn.Conv1d(4, 4, 1, groups=2)):
        with pytest.raises(ValueError, match=r"must compute W x . b of whole vectors x"):
            PersistentConv1d.from_dense(conv)
    assert PersistentConv1d.from_dense(make_linear(kind=nn.Conv1d, padding="same")).in_channels == IN


def test_little_to_skip_is_said():
    with pytest.warns(UserWarning, match="weight is 0% zeros and 100% of the units.*runs as a dense product"):
        ours = convert(nn.Linear(4, 4), storage=None)
    assert_close(ours(torch.zeros(1, 4)), ours.bias[None])


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles_and_forks(kind):
    layer = make_linear(kind=kind)
    ours, x = convert(layer), make_input(kind, 3)
    expected = ours(x)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(again(x), expected)
        assert again.weight_values.data_ptr() != ours.weight_values.data_ptr()
    assert torch.equal(run_after_fork(ours, x)[0], expected)


def test_state_dict_and_casts():
    layer = make_linear()
    ours, other = convert(layer), convert(make_linear())
    assert [*ours.state_dict()] == ["weight_values", "weight_columns", "weight_starts", "bias"]
    other.bias.zero_()
    other.load_state_dict(ours.state_dict())
    x = torch.randn(2, IN)
    assert torch.equal(other(x), ours(x))
    half = copy.deepcopy(ours).half()
    assert (half.dtype, half.weight.values.dtype, half.weight.columns.dtype) == (*[torch.float16] * 2, torch.int32)
    assert_close(half(x.half()).float(), layer(x), 0.01)
    narrow = convert(layer, weight_dtype=torch.bfloat16).double()
    assert narrow.weight.values.dtype == torch.bfloat16
    assert narrow.dtype == torch.float64


CHANGES: dict[str, Any] = {
    "values": lambda ours: ours.weight_values.mul_(2),
    "bias": lambda ours: ours.bias.add_(1),
    "data": lambda ours: setattr(ours.bias, "data", ours.bias.data + 1),
    "shared": lambda ours: ours.share_memory(),
    "backend": lambda ours: setattr(ours, "backend", "reference"),
    "threads": lambda ours: setattr(ours, "num_threads", 2),
}


@each_backend
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_followed(backend, change):
    ours, x = convert(make_linear(), backend), torch.randn(2, IN)
    ours(x)
    if not (backend == "triton" and change == "data"):  # writes that torch does not count
        CHANGES[change](ours)
    assert_close(ours(x), ours.to_dense()(x))


def test_indices_that_are_wrong_are_found():
    ours, x = convert(make_linear()), torch.randn(2, IN)
    ours(x)
    ours.weight_columns.fill_(1000)
    with pytest.raises(ValueError, match="columns must lie in"):
        ours(x)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch uses it for forward-mode AD
def test_no_backward_but_forward_with_gradients_on():
    ours, x = convert(make_linear()), torch.randn(2, IN, requires_grad=True)
    y = ours(x)
    assert torch.equal(y.detach(), ours(x.detach()))
    with pytest.raises(RuntimeError, match="has no backward"):
        y.sum().backward()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="has no derivatives, forward-mode"):
        ours(forward_ad.make_dual(x.detach(), torch.ones_like(x)))


def test_autocast_gives_its_dtype():
    layer = make_linear()
    ours = convert(layer)
    with torch.autocast("cpu", torch.bfloat16):
        for x in (torch.randn(2, IN), torch.randn(2, IN).half()):
            assert ours(x).dtype == layer(x).dtype == torch.bfloat16
            assert_close(ours(x).float(), layer(x).float(), 0.05)
        with pytest.raises(RuntimeError, match="mat1 and mat2 must have the same dtype"):
            ours(torch.randn(2, IN).double())


@each_backend
@pytest.mark.parametrize("kind", KINDS)
def test_compile_and_export(kind, backend):
    torch.compiler.reset()
    ours = convert(make_linear(kind=kind), backend)
    compiled: Any = torch.compile(ours, fullgraph=True, dynamic=True, backend="eager")
    exported = torch.export.export(ours, (make_input(kind, 3),), dynamic_shapes=({0: Dim("B")},))
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    for B in (3, 2, 5):
        x = make_input(kind, B)
        for run in (compiled, exported.module(), torch.export.load(buffer).module()):
            assert torch.equal(run(x), ours(x))
            buffer.seek(0)


def test_torch_fx_records_a_call():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = convert(make_linear())

        def forward(self, x):
            return 2 * self.fc(x)

    model = Doubled()
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["fc"]
    x = torch.randn(2, IN)
    assert torch.equal(traced(x), model(x))


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning")  # of torch 2.13, and in use
def test_other_tracers_are_refused():
    ours = convert(make_linear())
    with pytest.raises(RuntimeError, match=r"torch.jit.trace.* cannot record a PersistentLinear"):
        torch.jit.trace(ours, torch.zeros(1, IN))
    with pytest.raises(RuntimeError, match=r"torch.jit.script cannot compile a PersistentLinear"):
        torch.jit.script(ours)


def test_what_was_added_is_taken_over():
    layer = make_linear()
    layer.label = "head"
    layer.register_buffer("steps", torch.tensor(3))
    layer.register_forward_hook(lambda module, args, y: 2 * y)
    ours, x = convert(layer), torch.randn(2, IN)
    assert (ours.label, int(ours.steps)) == ("head", 3)
    assert_close(ours(x), layer(x), 2e-5)
    dense = ours.to_dense()
    assert (dense.label, [*dense.state_dict()]) == ("head", ["weight", "bias", "steps"])
    layer.forward = lambda x: x
    with pytest.raises(ValueError, match="has its own forward set on the layer itself"):
        convert(layer)


def test_warm_up_leaves_nothing_for_the_first_call():
    ours = convert(make_linear())
    ours.warm_up()
    plan = ours._plan
    ours(torch.randn(2, 3, IN))
    assert plan is not None
    assert ours._plan is plan


def test_a_class_of_ones_own():
    class Scaled(nn.Linear):
        def scaled(self, x):
            return 2 * self(x)

    class PersistentScaled(PersistentLinear):
        dense_class = Scaled

        def scaled(self, x):
            return 2 * self(x)

    torch.manual_seed(0)
    layer = Scaled(IN, OUT)
    with pytest.warns(UserWarning, match="little to skip"):
        ours = PersistentScaled.from_dense(layer)
    x = torch.randn(2, IN)
    assert_close(ours.scaled(x), layer.scaled(x), 2e-5)
    assert type(ours.to_dense()) is Scaled
