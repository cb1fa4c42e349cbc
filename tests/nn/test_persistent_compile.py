"""torch.compile, torch.export and AOTInductor take the persistent modules."""

import io
import shutil
from typing import Any

import pytest
import torch
from persistent_cases import CELLS, assert_same_bits, convert, make_pruned, make_states
from torch import nn
from torch.export import Dim
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from triton_sparse_rnn.kernels.triton.exchange import INTERPRETED

# Backends are inside the operator, which compilers do not see: each cell on one of them, Triton by its interpreter.
each_cell = pytest.mark.parametrize(
    ("cell", "backend"), [(nn.RNN, "triton" if INTERPRETED else "cpu"), (nn.GRU, "cpu"), (nn.LSTM, "reference")]
)
SIZES = [(6, 3), (4, 2), (9, 7), (1, 1)]  # T, B

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    torch.compiler.reset()


@each_cell
def test_compile_the_whole_call(cell, backend):
    ours = convert(make_pruned(cell, num_layers=2, bidirectional=True), backend)
    compiled: Any = torch.compile(ours, fullgraph=True, dynamic=True, backend="eager")
    for T, B in SIZES[1:2] if backend == "triton" else SIZES[:2]:
        x, hx = torch.randn(T, B, 5), make_states(ours, B)
        assert_same_bits(compiled(x, hx), ours(x, hx))


def test_a_compiled_call_has_no_backward_either():
    ours = convert(make_pruned(nn.GRU))
    compiled: Any = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 2, 5, requires_grad=True)
    y, _ = compiled(x)
    assert_same_bits(y, ours(x)[0])
    with pytest.raises(RuntimeError, match="has no backward"):
        y.sum().backward()


@each_cell
def test_compile_a_step(cell, backend):
    ours = convert(make_pruned(cell), backend)
    compiled = torch.compile(ours.step, fullgraph=True, backend="eager")
    hx = None
    for x_t in torch.randn(3, 2, 5):
        result = compiled(x_t, hx)
        assert_same_bits(result, ours.step(x_t, hx))
        hx = result[1]


def test_compile_with_a_packed_sequence():
    ours = convert(make_pruned(nn.GRU, num_layers=2))
    x = pack_sequence([torch.randn(t, 5) for t in (2, 6, 3)], enforce_sorted=False)
    compiled: Any = torch.compile(ours, backend="eager")
    assert_same_bits(compiled(x), ours(x))


@pytest.mark.slow("compiler")
@needs_compiler
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # inductor uses it
def test_compile_with_inductor():
    ours = convert(make_pruned(nn.GRU))
    model = nn.Sequential(nn.Linear(5, 5).requires_grad_(False), ours)
    x = torch.randn(3, 2, 5)
    compiled: Any = torch.compile(model, fullgraph=True)
    for a, b in zip(compiled(x), model(x), strict=True):
        torch.testing.assert_close(a, b)


@each_cell
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow("compiler"))])
def test_export_with_dynamic_sizes(cell, backend, strict):
    ours = convert(make_pruned(cell, num_layers=2), backend)
    T, B = Dim("T"), Dim("B")
    sample, hx = torch.randn(6, 3, 5), make_states(ours, 3)
    axes = ({1: B}, {1: B}) if cell is nn.LSTM else {1: B}
    exported = torch.export.export(ours, (sample, hx), dynamic_shapes=({0: T, 1: B}, axes), strict=strict)
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    for program in (exported, torch.export.load(buffer)):
        for steps, batch in SIZES[3:] if backend == "triton" else SIZES:
            x, hx = torch.randn(steps, batch, 5), make_states(ours, batch)
            assert_same_bits(program.module()(x, hx), ours(x, hx))


class Classifier(nn.Module):
    """Builds a PackedSequence inside, and returns the last state of each sequence."""

    def __init__(self, rnn: nn.Module):
        super().__init__()
        self.rnn = rnn

    def forward(self, x, lengths):
        return self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))[1]


@pytest.mark.parametrize("cell", CELLS)
def test_export_with_a_packed_sequence_inside(cell):
    layer = make_pruned(cell, num_layers=2, bidirectional=True)
    model = Classifier(convert(layer))
    T, B = Dim("T"), Dim("B")
    sample = torch.randn(6, 3, 5), torch.tensor([2, 6, 3])
    exported = torch.export.export(model, sample, dynamic_shapes=({0: T, 1: B}, {0: B}))
    for lengths in ([2, 6, 3], [4, 1], [1], [3, 3, 5, 1, 2]):
        arguments = torch.randn(max(lengths), len(lengths), 5), torch.tensor(lengths)
        assert_same_bits(exported.module()(*arguments), model(*arguments))


@pytest.mark.slow("compiler")
@needs_compiler
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # inductor uses it
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated")  # its packages use that
def test_aot_inductor(tmp_path):
    ours = convert(make_pruned(nn.GRU), "cpu")
    axes = {0: Dim("T", max=64), 1: Dim("B", max=64)}
    exported = torch.export.export(ours, (torch.randn(6, 3, 5),), dynamic_shapes=(axes,))
    path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "gru.pt2"))
    packaged = torch._inductor.aoti_load_package(path)
    for T, B in SIZES[:3]:
        x = torch.randn(T, B, 5)
        assert_same_bits(packaged(x), ours(x))


class FirstState(nn.Module):
    """Makes its first state of a parameter, as many models do, and looks for a weight."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        h = next(self.rnn.parameters()).new_zeros(1, x.shape[1], 7)
        return self.rnn(x, h)[0] if not hasattr(self.rnn, "weight_hh_l0") else x


def test_compile_code_written_for_torch_nn():
    model = FirstState(convert(make_pruned(nn.GRU)))
    x = torch.randn(4, 2, 5)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    assert_same_bits(compiled(x), model(x))
