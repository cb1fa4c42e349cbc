"""torch.jit.script, torch.fx and torch.onnx with the training and the persistent modules."""

import copy
import io
import pickle
import sys
import types
from typing import Any

import pytest
import torch
from persistent_cases import CELLS, assert_same_bits, convert, make_pruned, make_states
from torch import nn
from torch.fx.proxy import TraceError
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from triton_sparse_rnn import GateGradientSparsity, SparseGRU, SparseLSTM, SparseRNN, sparsify, to_dense

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning"),  # of torch 2.13, and in use
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),  # of nn.LSTM
]
says_what_script_takes = pytest.mark.filterwarnings("ignore:torch.jit.script takes an nn")  # it has its own test
OPTIONS: dict[Any, dict[str, Any]] = {nn.RNN: {"nonlinearity": "relu"}, nn.GRU: {}, nn.LSTM: {"proj_size": 3}}


class Tagger(nn.Module):
    """The same layer twice, once with a state by name."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.stack = nn.ModuleDict({"rnn": layer})

    def forward(self, x, hx):
        y, h = self.stack["rnn"](x, hx)
        z, h = self.stack["rnn"](x, hx=h)
        return y + z, h


class Holder(nn.Module):
    """By itself a scripted nn.GRU cannot be called; torch scripts its overloads only."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.rnn = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x)[0]


class Packing(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.rnn = layer

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        y: PackedSequence = self.rnn(packed)[0]
        return y.data


def build(cell, **options) -> Any:
    """A training module with every option that its class has."""
    everything = {"num_layers": 2, "bidirectional": True, "batch_first": True, **OPTIONS[cell], **options}
    return sparsify(make_pruned(cell, **everything)).requires_grad_(True)


def calls(layer: Any) -> tuple[Any, Any]:
    return torch.randn(2, 4, 5), make_states(layer, 2)


@says_what_script_takes
@pytest.mark.parametrize("cell", CELLS)
def test_a_scripted_layer_is_the_one_of_torch(cell):
    layer = build(cell)
    x, _ = calls(layer)
    expected = layer(x)
    torch.jit.script(layer)
    assert type(layer) is {nn.RNN: SparseRNN, nn.GRU: SparseGRU, nn.LSTM: SparseLSTM}[cell]
    scripted: Any = torch.jit.script(nn.Sequential(layer))
    assert_same_bits(scripted(x), expected)
    scripted(x)[0].sum().backward()  # on the very same parameters
    assert all(parameter.grad is not None for parameter in layer.parameters())


@says_what_script_takes
@pytest.mark.parametrize("cell", CELLS)
def test_a_scripted_layer_takes_a_packed_sequence(cell):
    model = Packing(sparsify(make_pruned(cell, **OPTIONS[cell])))
    arguments = torch.randn(4, 3, 5), torch.tensor([2, 4, 1])
    expected = model(*arguments)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(model), buffer)
    buffer.seek(0)
    assert_same_bits(torch.jit.load(buffer)(*arguments), expected)


@says_what_script_takes
def test_scripting_keeps_train_and_dropout():
    model = Holder(SparseGRU(5, 7, 2, dropout=1.0, batch_first=True))
    x = torch.randn(2, 4, 5)
    trained, expected = model(x), copy.deepcopy(model).eval()(x)
    assert not torch.equal(trained, expected)
    scripted: Any = torch.jit.script(model)
    assert_same_bits(scripted(x), trained)
    assert_same_bits(scripted.eval()(x), expected)


def test_what_torch_does_to_the_scripted_model_is_said_and_sparsify_undoes_it():
    model = nn.Sequential(build(nn.GRU))
    parameters = list(model.parameters())
    with pytest.warns(UserWarning, match=r"takes an nn.GRU .* instead of a SparseGRU.* sparsify\(model\)") as caught:
        torch.jit.script(model)
    assert [warning.filename for warning in caught if "SparseGRU" in str(warning.message)] == [__file__]
    assert type(model[0]) is nn.GRU  # torch's doing: it swaps what __prepare_scriptable__ gives in the model itself
    assert type(sparsify(model)[0]) is SparseGRU
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    copied = to_dense(model)
    torch.jit.script(copied)
    assert type(model[0]) is SparseGRU


@pytest.mark.parametrize("sparse_class", [SparseGRU, SparseLSTM])
def test_scripting_does_not_lose_a_gate_gradient(sparse_class):
    model = nn.Sequential(sparse_class(5, 7, gate_gradient=GateGradientSparsity(threshold=0.1)))
    with pytest.raises(RuntimeError, match=r"would lose its gate_gradient: script to_dense\(model\), a copy"):
        torch.jit.script(model)
    assert type(model[0]) is sparse_class
    torch.jit.script(to_dense(model))
    assert model[0].gate_gradient is not None


class Stateful(SparseLSTM):
    def initial_state(self): ...


class Renamed(SparseLSTM):
    """Adds nothing."""


@says_what_script_takes
def test_scripting_a_subclass():
    with pytest.raises(RuntimeError, match="instead of this Stateful, but that would lose initial_state"):
        torch.jit.script(Stateful(5, 7))
    layer = SparseRNN(5, 7)
    parametrize.register_parametrization(layer, "weight_hh_l0", nn.Identity())
    with pytest.raises(RuntimeError, match=r"would lose .*weight_hh_l0: undo a parametrization first"):
        torch.jit.script(layer)
    torch.jit.script(Renamed(5, 7))


@pytest.mark.parametrize("cell", CELLS)
def test_fx_makes_one_node_of_a_call(cell):
    layer = build(cell)
    model = Tagger(layer)
    traced = torch.fx.symbolic_trace(model)
    nodes = [node for node in traced.graph.nodes if node.op == "call_module"]
    assert [node.target for node in nodes] == ["stack.rnn"] * 2
    assert list(nodes[1].kwargs) == ["hx"]
    assert traced.get_submodule("stack.rnn") is layer
    x, hx = calls(layer)
    for same in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        assert_same_bits(same(x, hx), model(x, hx))
    traced(x, hx)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("cell", CELLS)
def test_fx_makes_the_graph_that_it_makes_of_torch_nn(cell):
    dense = make_pruned(cell)
    expected = torch.fx.symbolic_trace(Tagger(dense)).code
    assert torch.fx.symbolic_trace(Tagger(sparsify(dense))).code == expected
    assert torch.fx.symbolic_trace(Tagger(convert(dense))).graph.python_code("self").src.count("self.stack.rnn(") == 2


def test_a_state_of_two_proxies():
    class Split(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.rnn = layer

        def forward(self, x, h, c):
            return self.rnn(x, (h, c))[0]

    x, (h, c) = torch.randn(4, 2, 5), make_states(make_pruned(nn.LSTM), 2)
    layer = make_pruned(nn.LSTM)
    for model in (Split(convert(layer)), Split(sparsify(layer))):
        assert_same_bits(torch.fx.symbolic_trace(model)(x, h, c), model(x, h, c))


@pytest.mark.parametrize("sparse", [True, False])
def test_hooks_run_when_the_graph_runs_and_once(sparse):
    layer: Any = sparsify(make_pruned(nn.GRU)) if sparse else convert(make_pruned(nn.GRU))
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 3, *args[1:]))
    layer.register_forward_hook(lambda module, args, result: (result[0] * 5, result[1]))
    model = nn.Sequential(layer)
    x = torch.randn(4, 2, 5)
    assert_same_bits(torch.fx.symbolic_trace(model)(x), model(x))


def test_a_tracer_with_leaves_of_its_own():
    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, m, module_qualified_name):
            return isinstance(m, (nn.GRU, nn.Linear))

    model = nn.Sequential(nn.Linear(5, 5), SparseGRU(5, 7))
    graph = Leaves().trace(model)
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["0", "1"]
    assert_same_bits(torch.fx.GraphModule(model, graph)(torch.ones(2, 1, 5)), model(torch.ones(2, 1, 5)))


def test_a_layer_by_itself_is_refused_as_torch_nn_is():
    for layer in (nn.GRU(5, 7), SparseGRU(5, 7)):
        with pytest.raises(TraceError):
            torch.fx.symbolic_trace(layer)
    with pytest.raises(RuntimeError, match=r"cannot trace a PersistentGRU by itself.* such as nn.Sequential\(layer\)"):
        torch.fx.symbolic_trace(convert(make_pruned(nn.GRU)))


def test_training_goes_on_through_a_traced_model():
    torch.manual_seed(0)
    model: Any = nn.Sequential(SparseLSTM(5, 7, gate_gradient=GateGradientSparsity(threshold=1e9)))
    traced = torch.fx.symbolic_trace(model)
    traced(torch.randn(4, 2, 5))[0].sum().backward()
    assert model[0].gate_gradient_stats is not None


@pytest.mark.parametrize("cell", CELLS)
def test_fx_takes_converted_layers(cell):
    dense = make_pruned(cell, num_layers=2, bidirectional=True, batch_first=True, **OPTIONS[cell])
    model = Tagger(convert(dense))
    traced = torch.fx.symbolic_trace(model)
    x, hx = calls(dense)
    for same in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        assert_same_bits(same(x, hx), model(x, hx))


@pytest.mark.parametrize("cell", CELLS)
def test_fx_takes_a_step(cell):
    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = convert(make_pruned(cell, num_layers=2))

        def forward(self, x, hx):
            y, hx = self.rnn.step(x, hx)
            return self.rnn.step(x)[0] + y, hx

    model = Stream()
    x, hx = torch.randn(3, 5), make_states(model.rnn, 3)
    model.rnn.step(x)  # a layer that has run, and keeps a plan
    traced = torch.fx.symbolic_trace(model)
    for same in (traced, pickle.loads(pickle.dumps(traced))):
        assert_same_bits(same(x, hx), model(x, hx))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of nn.GRU
@pytest.mark.parametrize("cell", CELLS)
def test_torchscript_of_a_converted_layer_says_what_to_do(cell):
    layer = convert(make_pruned(cell))
    for model in (layer, nn.Sequential(layer)):
        with pytest.raises(RuntimeError, match=r"torch.jit.script cannot compile a Persistent.* to_dense\(model\)"):
            torch.jit.script(model)
        with pytest.raises(RuntimeError, match=r"torch.jit.trace, .* cannot record a Persistent.* to_dense\(model\)"):
            torch.jit.trace(model, torch.randn(4, 2, 5))
    dense, x = nn.Sequential(to_dense(layer)), torch.randn(4, 2, 5)
    assert_same_bits(torch.jit.script(dense)(x), dense(x))
    traced: Any = torch.jit.trace(dense, x)
    assert_same_bits(traced(x), dense(x))
    layer(x)  # and is not harmed


@pytest.mark.parametrize("strict", [False, True])
def test_onnx_export_of_a_converted_layer_says_what_to_do(monkeypatch, strict):
    """torch.onnx.export(dynamo=True) calls torch.export first, with this flag set; it needs packages of its own."""
    exporter: Any = types.ModuleType("torch.onnx._internal.exporter._flags")
    exporter._is_onnx_exporting = True
    monkeypatch.setitem(sys.modules, exporter.__name__, exporter)
    torch.compiler.reset()
    model, x = nn.Sequential(convert(make_pruned(nn.GRU))), torch.randn(4, 2, 5)
    with pytest.raises(Exception, match=r"ONNX has no operator for a PersistentGRU.* to_dense\(model\)"):
        torch.export.export(model, (x,), strict=strict)
    torch.compiler.reset()
    exporter._is_onnx_exporting = False
    torch.export.export(model, (x,), strict=strict)
