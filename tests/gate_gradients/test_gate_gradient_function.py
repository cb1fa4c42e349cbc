"""One layer against nn.LSTM and nn.GRU, and everything that autograd may ask of it."""

import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from rounding import assert_same_sums
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.rnn import PackedSequence

from triton_sparse_rnn.gate_gradients.contract import (
    Arriving,
    BackwardDirection,
    Decision,
    Gradients,
    Needed,
    Rule,
    Steps,
)
from triton_sparse_rnn.gate_gradients.function import run_layer
from triton_sparse_rnn.sparse.layer_config import GATES

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # of nn.LSTM
I, H = 5, 7
UNIFORM, RAGGED = (4, 4, 4), (5, 5, 3, 1)
WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


class Recorder:
    """A Control that notes what it is told, and lets nothing become zero unless it has thresholds."""

    def __init__(self, thresholds: Tensor | None = None, backend: str | None = "reference") -> None:
        self.backend, self.thresholds, self.rule = backend, thresholds, Rule()
        self.begun: list[tuple[int, BackwardDirection, Arriving]] = []
        self.finished: list[tuple[int, Needed, Gradients]] = []

    def begin(self, index: int, direction: BackwardDirection, arriving: Arriving) -> Decision:
        self.begun.append((index, direction, arriving))
        seed = torch.ones(1, dtype=torch.int64, device=direction.x.device)  # a copy to a GPU would wait for it
        return Decision(self.rule, self.thresholds, seed, keep_gates=True)

    def finish(
        self, index: int, direction: BackwardDirection, needed: Needed, decision: Decision, gradients: Gradients
    ) -> None:
        self.finished.append((index, needed, gradients))


class Call(NamedTuple):
    """A module of one layer, and inputs of it: x [N, I], h0 and, for an LSTM, c0."""

    module: nn.LSTM | nn.GRU
    sizes: tuple[int, ...]
    packed: bool
    inputs: list[Tensor]

    def dense(self) -> list[Tensor]:
        """What the module gives: y [N, D R], h_n and, for an LSTM, c_n."""
        x, *states = self.inputs
        shape = len(self.sizes), self.sizes[0], I
        x = PackedSequence(x, torch.tensor(self.sizes)) if self.packed else x.view(shape)
        y, ends = self.module(x, tuple(states) if len(states) == 2 else states[0])
        y = y.data if self.packed else y.flatten(0, 1)
        return [y, *(ends if isinstance(ends, tuple) else [ends])]

    def sparse(self, control: Recorder, first_index: int = 0) -> list[Tensor]:
        """What `run_layer` gives."""
        x, h0, *c0 = self.inputs
        mode: Any = self.module.mode
        outputs = run_layer(
            control, first_index, mode, x, self.sizes, self.packed, h0, c0[0] if c0 else None, weights_of(self.module)
        )
        return [output for output in outputs if output is not None]

    def leaves(self) -> list[Tensor]:
        return [*self.inputs, *self.module.parameters()]

    def terms(self) -> int:
        """How many numbers meet in a gradient: at every step those of the gates and of what they are made of, on the
        way back as many as there are gates, and in the end the rows of all steps.
        """
        own = [parameter for name, parameter in self.module.named_parameters() if not name.endswith("_reverse")]
        columns = sum(parameter.shape[1] if parameter.dim() == 2 else 1 for parameter in own)
        return len(self.sizes) * (columns + GATES[self.module.mode] * H) + sum(self.sizes)


def weights_of(module: nn.RNNBase, layer: int = 0) -> list[Any]:
    names = [f"_l{layer}", f"_l{layer}_reverse"][: 1 + module.bidirectional]
    return [tuple(getattr(module, weight + name, None) for weight in WEIGHTS) for name in names]


def make_call(
    mode: str,
    sizes: tuple[int, ...] = UNIFORM,
    *,
    packed: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    proj_size: int = 0,
    **options: Any,
) -> Call:
    torch.manual_seed(0)
    options |= {"proj_size": proj_size} if proj_size else {}
    module = {"LSTM": nn.LSTM, "GRU": nn.GRU}[mode](I, H, dtype=dtype, device=device, **options)
    D = 1 + module.bidirectional
    shapes = [(sum(sizes), I), (D, sizes[0], proj_size or H), (D, sizes[0], H)]
    inputs = [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]
    return Call(module, sizes, packed, inputs if mode == "LSTM" else inputs[:2])


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a loss with some weight on every output."""
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
    return torch.autograd.grad(outputs, inputs, grads, retain_graph=True)


LAYERS = [("LSTM", 0), ("LSTM", 3), ("GRU", 0)]


@pytest.mark.parametrize(("mode", "proj_size"), LAYERS)
@pytest.mark.parametrize(("sizes", "packed"), [((2, 2), False), ((2, 1), True)])
def test_gradcheck(mode, proj_size, sizes, packed):
    """Every output apart too, as gradients of the others are missing then."""
    call = make_call(mode, sizes, packed=packed, dtype=torch.float64, proj_size=proj_size, bidirectional=True)

    names = [name for name, _ in call.module.named_parameters()]

    def run(*leaves: Tensor) -> list[Tensor]:
        inputs, parameters = leaves[: -len(names)], leaves[-len(names) :]
        module = SimpleNamespace(**dict(zip(names, parameters, strict=True)), mode=mode, bidirectional=True)
        return Call(module, sizes, packed, list(inputs)).sparse(Recorder())  # type: ignore[reportArgumentType]

    torch.autograd.gradcheck(run, call.leaves(), fast_mode=True)


@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_one_output_alone(mode, backend):
    call = make_call(mode, bidirectional=True)
    for output, expected in zip(call.sparse(Recorder(backend=backend)), call.dense(), strict=True):
        grads, exact = gradients([output], call.leaves()), gradients([expected], call.leaves())
        assert_same_sums(grads, exact, call.terms())


@pytest.mark.parametrize("backend", [None, "reference"])
def test_only_what_requires_a_gradient_is_computed(backend):
    call = make_call("LSTM", proj_size=3 if backend == "reference" else 0, bidirectional=True)
    everything = call.leaves()
    exact = gradients(call.dense(), everything)
    for number, chosen in enumerate(everything):
        for leaf in everything:
            leaf.requires_grad_(leaf is chosen)
        control = Recorder(backend=backend)
        (grad,) = gradients(call.sparse(control), [chosen])
        assert_same_sums([grad], [exact[number]], call.terms())
        assert sum(sum(needed) for _, needed, _ in control.finished) == (2 if number == 0 else 0 if number < 3 else 1)


def test_a_control_is_asked_about_every_direction_at_every_backward():
    call, control = make_call("LSTM", RAGGED, packed=True, bidirectional=True, bias=False), Recorder()
    outputs = call.sparse(control, first_index=4)
    assert not control.begun
    first, second = gradients(outputs, call.leaves()), gradients(outputs, call.leaves())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert [index for index, _, _ in control.begun] == [4, 5, 4, 5]
    assert [index for index, _, _ in control.finished] == [4, 5, 4, 5]
    for d, (_, direction, arriving) in enumerate(control.begun[:2]):
        assert direction.steps == Steps(RAGGED, reverse=d == 1)
        assert torch.equal(direction.y, outputs[0].chunk(2, dim=1)[d])
        assert torch.equal(direction.weight_hh, weights_of(call.module)[d][1])
        assert direction.bias_ih is None
        assert [tensor.shape for tensor in arriving if tensor is not None] == [(sum(RAGGED), H), (5, H), (5, H)]
    assert not torch.equal(control.begun[0][2].h, control.begun[1][2].h)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_tensors_may_have_any_strides(backend):
    """Inputs, weights and arriving gradients: transposed, expanded, with gaps."""
    call = make_call("LSTM", bidirectional=True)
    exact = gradients([call.dense()[0].sum(), call.dense()[1].sum()], call.leaves())

    def spread(tensor: Tensor) -> Tensor:
        return tensor.detach().t().contiguous().t().requires_grad_() if tensor.dim() == 2 else tensor

    def gapped(tensor: Tensor) -> Tensor:
        return torch.stack([tensor.detach(), tensor.detach()], dim=-1)[..., 0].requires_grad_()

    x, h0, c0 = spread(call.inputs[0]), gapped(call.inputs[1]), gapped(call.inputs[2])
    weights = [tuple(None if w is None else spread(w) for w in one) for one in weights_of(call.module)]
    y, h_n, _ = run_layer(Recorder(backend=backend), 0, "LSTM", x, UNIFORM, False, h0, c0, weights)  # type: ignore[reportArgumentType]
    leaves = [x, h0, c0, *(weight for one in weights for weight in one if weight is not None)]
    grads = gradients([y.sum(), h_n.sum()], leaves)
    assert_same_sums(grads, exact, call.terms())


def test_the_workspace_of_onednn_is_kept_where_it_ran():
    control = Recorder()
    for call in (make_call("LSTM"), make_call("LSTM", packed=True), make_call("GRU"), make_call("LSTM", proj_size=3)):
        gradients(call.sparse(control), call.leaves())
    kept = [direction.workspace is not None for _, direction, _ in control.begun]
    assert kept == [torch.backends.mkldnn.is_available(), False, False, False]


def test_without_onednn():
    call, control = make_call("LSTM", bidirectional=True), Recorder(backend=None)
    allowed = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        expected, outputs = call.dense(), call.sparse(control)
    finally:
        torch._C._set_mkldnn_enabled(allowed)
    assert all(torch.equal(output, dense) for output, dense in zip(outputs, expected, strict=True))
    assert_same_sums(gradients(outputs, call.leaves()), gradients(expected, call.leaves()), call.terms())
    assert all(direction.workspace is None for _, direction, _ in control.begun)


def test_everything_saved_goes_through_hooks():
    call, saved = make_call("LSTM"), []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor.clone(), lambda tensor: tensor):
        outputs = call.sparse(Recorder())
    expected = len(call.leaves()) + 1 + torch.backends.mkldnn.is_available()  # y and the workspace
    assert len(saved) == expected
    grads = gradients(outputs, call.leaves())
    assert all(torch.equal(a, b) for a, b in zip(grads, gradients(call.sparse(Recorder()), call.leaves()), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing_in_backward(dtype):
    call = make_call("LSTM", dtype=dtype, bidirectional=True)
    outputs = call.sparse(Recorder())
    expected = gradients(outputs, call.leaves())
    with torch.autocast("cpu", torch.bfloat16 if dtype == torch.float32 else torch.float16):
        grads = gradients(outputs, call.leaves())
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_gradients_cannot_be_differentiated_again():
    call = make_call("LSTM", dtype=torch.float64)
    outputs = call.sparse(Recorder())
    (grad,) = torch.autograd.grad(outputs[0].sum(), call.inputs[0], create_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(call.dense()[0].sum(), call.inputs[0])[0])
    with pytest.raises(RuntimeError, match="cannot be differentiated twice: set its gate_gradient to None"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_torch_func_grad(backend):
    call = make_call("LSTM")

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        (weights,), (_, h0, c0) = weights_of(call.module), call.inputs
        weights = [(weights[0], weight, *weights[2:])]
        y, h_n, _ = run_layer(Recorder(backend=backend), 0, "LSTM", x, UNIFORM, False, h0, c0, weights)
        return y.square().sum() + h_n.sum()

    x, weight = call.inputs[0].detach(), call.module.get_parameter("weight_hh_l0").detach()
    grads = torch.func.grad(loss, argnums=(0, 1))(weight, x)
    y, h_n, _ = call.dense()
    leaves = [call.module.get_parameter("weight_hh_l0"), call.inputs[0]]
    assert_same_sums(grads, torch.autograd.grad(y.square().sum() + h_n.sum(), leaves), call.terms())
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.func.grad(lambda x: torch.func.grad(loss, argnums=1)(weight, x).sum())(x)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")  # torch.func.jvp calls it
def test_what_cannot_be_done_is_refused_by_name():
    call = make_call("LSTM")
    x = call.inputs[0].detach()

    def run(x: Tensor) -> Tensor:
        return call._replace(inputs=[x, *call.inputs[1:]]).sparse(Recorder())[0]

    with pytest.raises(RuntimeError, match=r"cannot run under torch\.vmap"):
        torch.vmap(run)(torch.stack([x, x]))
    with pytest.raises(RuntimeError, match=r"cannot run under torch\.vmap"):
        torch.func.jacrev(run)(x)
    with pytest.raises(RuntimeError, match="cannot be differentiated in forward mode"):
        torch.func.jvp(run, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="cannot be differentiated in forward mode"):
        run(forward_ad.make_dual(x, x))
    y = run(call.inputs[0])
    with pytest.raises(RuntimeError, match="cannot take many gradients at once"):
        torch.autograd.grad(y, call.inputs[0], torch.stack([y, y]).detach(), is_grads_batched=True)


@pytest.mark.gpu
@pytest.mark.parametrize(("mode", "proj_size"), LAYERS)
@pytest.mark.parametrize(("sizes", "packed"), [(UNIFORM, False), (RAGGED, True)])
def test_forward_on_a_gpu_is_that_of_torch(mode, proj_size, sizes, packed):
    """For a layer of a stack too, without torch's warning that its weights are not in one piece."""
    options: dict[str, Any] = {"device": "cuda", "proj_size": proj_size, "bidirectional": True}
    call = make_call(mode, sizes, packed=packed, **options)
    stack = make_call(mode, sizes, packed=packed, num_layers=2, **options)
    for name, weight in call.module.named_parameters():
        stack.module.get_parameter(name).data.copy_(weight)
    expected = call.dense()
    for module in (call.module, stack.module):
        places = [parameter.data_ptr() for parameter in module.parameters()]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            outputs = Call(module, sizes, packed, call.inputs).sparse(Recorder())
        assert [parameter.data_ptr() for parameter in module.parameters()] == places
        torch.testing.assert_close(outputs, expected)
        torch.testing.assert_close(gradients(outputs, call.inputs), gradients(expected, call.inputs))


@pytest.mark.gpu
@pytest.mark.parametrize(("mode", "proj_size"), LAYERS)
@pytest.mark.parametrize("sizes", [UNIFORM, RAGGED])
@pytest.mark.parametrize("selection", ["small", "sample"])
@pytest.mark.parametrize("group", ["elements", "blocks"])
def test_the_reference_never_waits_for_a_gpu(mode, proj_size, sizes, selection, group):
    call = make_call(mode, sizes, packed=True, device="cuda", proj_size=proj_size, bidirectional=True)
    thresholds = call.inputs[0].new_full((GATES[mode] if group == "elements" else 1,), 0.1)
    control = Recorder(thresholds)
    control.rule = Rule(selection, group, units=3, rows=2)
    outputs = call.sparse(control)
    grads = [torch.randn_like(output) for output in outputs]
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(outputs, call.leaves(), grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(gradients.zeros.any() for _, _, gradients in control.finished)
