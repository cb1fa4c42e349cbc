"""What the C runtime computes is what the layers compute."""

from __future__ import annotations

import copy
import ctypes
import functools
import shutil
import subprocess
import warnings
from typing import Any

import pytest
import torch
from c_builds import BUILDS, PROJECT, RUNTIME, Running, build, library, run
from rounding import rounding_of_sums, terms_of
from torch import Tensor, nn

from triton_sparse_rnn import Blocks, PersistentGRU, PersistentLSTM, PersistentRNN, Picks, export_c

CELLS: dict[str, tuple[Any, Any]] = {
    "RNN_TANH": (nn.RNN, PersistentRNN),
    "RNN_RELU": (functools.partial(nn.RNN, nonlinearity="relu"), PersistentRNN),
    "GRU": (nn.GRU, PersistentGRU),
    "LSTM": (nn.LSTM, PersistentLSTM),
    "LSTM projected": (functools.partial(nn.LSTM, proj_size=19), PersistentLSTM),
}
STORAGES = (Picks(), Blocks(16, 1), Blocks(5, 3), Picks(rows=4, bank=8, columns=2), None)
NARROW = (torch.float16, torch.bfloat16, torch.int8)
T = 6
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # of nn.LSTM


def pruned(cell: str, I: int, H: int, density: float = 0.3, **options: Any) -> nn.RNNBase:
    torch.manual_seed(H)
    layer = CELLS[cell][0](I, H, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() == 2:
                parameter.mul_(torch.rand_like(parameter) < density)
    return layer


def converted(cell: str, dense: nn.RNNBase, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*little to skip")  # some are dense on purpose
        return CELLS[cell][1].from_dense(dense, backend="reference", **options)


def assert_as_accurate_as_torch(results: list[Tensor], *modules: Any, x: Tensor) -> None:
    """Results in C, of x, have an error of no more than a few times that of torch in float32.

    Torch may happen to be exact: added are a few roundings of the functions behind the sums, and those of the sums.
    """
    exact, theirs = (_by_torch(modules, x.to(dtype)) for dtype in (torch.float64, torch.float32))
    terms = max(terms_of(_dense(module)) for module in modules if not _is_function(module))
    rounding = 4 * torch.finfo(torch.float32).eps + rounding_of_sums(terms)
    for our, their, right in zip(results, theirs, exact, strict=False):  # states, if they are given
        assert our.shape == right.shape
        error, their_error = ((result.double() - right).abs().max() for result in (our, their))
        assert error <= 4 * their_error + rounding * right.abs().max().clamp(min=1)  # NaN is not


def _is_function(module: Any) -> bool:
    return not [*module.buffers(), *module.parameters()]


def _dense(module: Any) -> Any:
    return module.to_dense() if hasattr(module, "to_dense") else module


def _by_torch(modules: tuple[Any, ...], x: Tensor) -> list[Tensor]:
    """Y and the states as C orders them."""
    states: list[Tensor] = []
    with torch.no_grad():
        for module in modules:
            layer = copy.deepcopy(_dense(module)).to(x.dtype)
            x = layer(x)
            if isinstance(x, tuple):
                x, hx = x
                ends = hx if isinstance(hx, tuple) else (hx,)
                states += [end[i] for i in range(len(ends[0])) for end in ends]
    return [x, torch.cat(states) if states else x.new_zeros(0)]


@pytest.mark.parametrize("H", [1, 20, 35])
@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_layers(cell, storage, H):
    if cell == "LSTM projected" and H < 20:
        H = 48
    layer = converted(cell, pruned(cell, 37, H), storage=storage)
    running = Running(layer)
    x = torch.randn(T, 37)
    y = running.run(x)
    assert_as_accurate_as_torch([y, running.state], layer, x=x)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("cell", ["GRU", "LSTM projected", "RNN_RELU"])
def test_narrow_weights(cell, storage, dtype):
    layer = converted(cell, pruned(cell, 20, 50), storage=storage, weight_dtype=dtype)
    running = Running(layer)
    x = torch.randn(T, 20)
    y = running.run(x)
    assert_as_accurate_as_torch([y, running.state], layer, x=x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_several_layers_and_directions(cell, bidirectional, bias):
    layer = converted(cell, pruned(cell, 9, 33, num_layers=3, bidirectional=bidirectional, bias=bias))
    running = Running(layer)
    for _ in range(2):
        x = torch.randn(T, 9)
        y = running.run(x)
        assert_as_accurate_as_torch([y, running.state], layer, x=x)
        running.reset()


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("storage", [Picks(), Blocks(16, 1)], ids=str)
def test_no_weights_and_all_of_them(storage, density):
    layer = converted("GRU", pruned("GRU", 70, 40, density), storage=storage)
    running = Running(layer)
    x = torch.randn(T, 70)
    y = running.run(x)
    assert_as_accurate_as_torch([y, running.state], layer, x=x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_modules(dtype):
    layer = converted("GRU", pruned("GRU", 20, 50).to(dtype))
    running = Running(layer)
    x = torch.randn(T, 20)
    y = running.run(x)
    assert_as_accurate_as_torch([y, running.state], layer, x=x)


def test_a_chain():
    torch.manual_seed(0)
    linear, last = nn.Linear(18, 40), nn.Linear(33, 5, bias=False)
    gru = converted("GRU", pruned("GRU", 40, 33))
    lstm = converted("LSTM", pruned("LSTM", 33, 33, num_layers=2))
    modules = (linear, nn.ReLU(), gru, nn.Dropout().eval(), nn.Sigmoid(), lstm, nn.Identity(), nn.Tanh(), last)
    running = Running(*modules)
    x = torch.randn(T, 18)
    y = running.run(x)
    assert_as_accurate_as_torch([y, running.state], *modules, x=x)


def test_a_chain_behind_both_directions():
    both = converted("LSTM", pruned("LSTM", 18, 33, bidirectional=True))
    modules = (both, nn.Sigmoid(), nn.Linear(66, 70))
    running = Running(*modules)
    x = torch.randn(T, 18)
    y = running.run(x)
    assert_as_accurate_as_torch([y, running.state], *modules, x=x)


def test_steps_are_a_sequence_to_the_bit():
    layer = converted("LSTM projected", pruned("LSTM projected", 20, 50, num_layers=2))
    running = Running(layer)
    x = torch.randn(T, 20)
    y = running.run(x)
    end = running.state
    running.reset()
    assert torch.equal(torch.stack([running.step(each) for each in x]), y)
    assert torch.equal(running.state, end)


def test_state_is_read_and_set():
    layer = converted("LSTM", pruned("LSTM", 20, 35, num_layers=2))
    running, other = Running(layer), Running(layer)
    x = torch.randn(T, 20)
    running.run(x[:3])
    other.state = running.state
    assert torch.equal(other.run(x[3:]), running.run(x[3:]))
    running.reset()
    assert running.state.eq(0).all()


@pytest.mark.parametrize(("offset", "shift"), [(1, 0), (0, 1), (4, 16), (63, 3)])
def test_memory_and_blob_may_lie_anywhere(offset, shift):
    layer = converted("GRU", pruned("GRU", 20, 50), storage=Picks())
    x = torch.randn(T, 20)
    assert torch.equal(Running(layer, offset=offset, shift=shift).run(x), Running(layer).run(x))


@pytest.mark.parametrize("storage", [Picks(), Blocks(16, 1)], ids=str)
def test_nan_and_infinity_travel_along_stored_weights(storage):
    dense = nn.GRU(40, 32)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.zero_()
        weight: Any = dense.weight_ih_l0
        weight[64:80, 5] = -1.0  # the n of half of the units
        weight[64:80, 6] = torch.linspace(0.1, 1, 16)
    running = Running(converted("GRU", dense, storage=storage))
    x = torch.zeros(3, 40)
    x[0, 5], x[1, 7], x[2, 5] = torch.inf, torch.nan, torch.nan
    y = running.run(x)
    assert torch.equal(y[0, :16], torch.full((16,), -0.5))  # z is one half
    assert not y[:2].isnan().any()
    assert y[2, :16].isnan().all()
    assert torch.equal(y[:, 16:], torch.zeros(3, 16))


def test_large_inputs_saturate_exactly():
    dense = nn.LSTM(1, 1)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.fill_(100.0)
    running = Running(converted("LSTM", dense, storage=(1, 1)))
    running.step(torch.ones(1))
    assert running.state.tolist() == [pytest.approx(0.7615942, abs=1e-6), 1.0]


def test_streams_share_a_model():
    layer = converted("GRU", pruned("GRU", 20, 50))
    one, other = Running(layer), Running(layer)
    x = torch.randn(2, T, 20)
    apart = [one.run(x[0]), other.run(x[1])]
    one.reset()
    other.reset()
    in_turn = [(one.step(x[0, t]), other.step(x[1, t])) for t in range(T)]
    assert torch.equal(torch.stack([a for a, _ in in_turn]), apart[0])
    assert torch.equal(torch.stack([b for _, b in in_turn]), apart[1])


def test_both_directions_have_no_step():
    running = Running(converted("GRU", pruned("GRU", 3, 5, bidirectional=True)))
    nothing = ctypes.c_void_p(0)
    status = running.library.tsr_step(ctypes.byref(running.stream), nothing, nothing)
    assert b"bidirectional" in running.library.tsr_message(status)
    assert running.library.tsr_run(ctypes.byref(running.stream), nothing, nothing, ctypes.c_size_t(1), None, 0)


@pytest.mark.slow("compiler")
@pytest.mark.parametrize("name", [name for name in BUILDS if name != "native"])
def test_every_build_computes_the_same(name, tmp_path):
    """Programs, so that another processor's and sanitized ones run too."""
    program = build(name, PROJECT / "examples" / "stream.c")
    chains = {
        f"{cell} {dtype} {storage}".replace("torch.", ""): [
            converted(cell, pruned(cell, 40, 50), storage=storage, weight_dtype=dtype)
        ]
        for cell, storage, dtype in (
            ("GRU", Picks(), torch.float32),
            ("GRU", Blocks(16, 1), torch.float16),
            ("LSTM projected", Picks(), torch.float16),
            ("LSTM", Picks(), torch.bfloat16),
            ("RNN_TANH", Blocks(16, 1), torch.bfloat16),
            ("RNN_RELU", Blocks(16, 1), torch.float32),
            ("LSTM", Blocks(16, 1), torch.int8),
            ("GRU", Picks(), torch.int8),
        )
    }
    chains["chain"] = [nn.Linear(40, 20), nn.ReLU(), converted("GRU", pruned("GRU", 20, 33)), nn.Sigmoid()]
    chains["both"] = [converted("LSTM", pruned("LSTM", 40, 33, num_layers=2, bidirectional=True)), nn.Tanh()]
    x = torch.randn(T, 40)
    for chain in chains.values():
        export_c(chain, tmp_path)
        done = run(name, program, [tmp_path / "model.bin"], x.numpy().tobytes())
        assert done.returncode == 0, done.stderr
        assert not done.stderr
        y = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32).view(T, -1)
        assert_as_accurate_as_torch([y], *chain, x=x)


def test_the_runtime_says_what_it_was_compiled_for():
    assert library().tsr_instructions().decode() in ("AVX-512", "AVX2", "NEON", "plain C")


@pytest.mark.slow("compiler")
@pytest.mark.parametrize("name", [name for name in BUILDS if BUILDS[name].instructions])
def test_each_build_takes_its_instructions(name, tmp_path):
    source = tmp_path / "says.c"
    lines = (
        "#include <stdio.h>",
        '#include "tsr_runtime.h"',
        "int main(void) { return puts(tsr_instructions()) < 0; }",
    )
    source.write_text("\n".join(lines) + "\n")
    done = run(name, build(name, source), [])
    assert done.stdout.decode().strip() == BUILDS[name].instructions


@pytest.mark.slow("compiler")
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_cpp_includes_the_header(compiler, tmp_path):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    (tmp_path / "one.cpp").write_text('#include "tsr_runtime.h"\nconst char *f() { return tsr_instructions(); }\n')
    strict = ["-std=c++11", "-Wall", "-Wextra", "-Werror", "-pedantic", "-c", f"-I{RUNTIME}"]
    subprocess.run([compiler, *strict, str(tmp_path / "one.cpp"), "-o", str(tmp_path / "one.o")], check=True)
