"""The persistent modules with weights in picks: every option, form and tool that blocks have."""

import copy
import io
import pickle
import shutil
from typing import Any

import pytest
import torch
from persistent_cases import (
    CELLS,
    CELLS_AND_BACKENDS,
    assert_as_exact_as_nn,
    assert_backends_agree_on_nan_and_infinity,
    assert_same_bits,
    convert,
    every_cell_on_the_cpu,
    make_states,
    run_after_fork,
)
from torch import nn
from torch.export import Dim
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_sequence

from triton_sparse_rnn import load_sparse, save_sparse, to_sparse
from triton_sparse_rnn.kernels.cpu import support
from triton_sparse_rnn.kernels.triton.exchange import INTERPRETED
from triton_sparse_rnn.sparse.block_matrix import STORAGE_DTYPES
from triton_sparse_rnn.sparse.picks import Picks

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # of nn.LSTM

PICKS = Picks(16, 32)
QUANTIZED: dict[str, Any] = {"weight_dtype": torch.int8, "activation_dtype": torch.int8}


def scattered(cell: Any, *sizes: int, zeros: float = 0.9, **options: Any) -> Any:
    """A layer in eval mode with single zeros anywhere, so that places are padded."""
    torch.manual_seed(0)
    layer = cell(*(sizes or (5, 37)), **options).eval().requires_grad_(False)
    for name, weight in layer.named_parameters():
        if name.startswith("weight"):
            weight.mul_(torch.rand(weight.shape) >= zeros)
    return layer


def picked(layer: Any, backend: str = "cpu", **options: Any) -> Any:
    return convert(layer, backend, **{"storage": PICKS, **options})


@every_cell_on_the_cpu
@pytest.mark.parametrize("pattern", [PICKS, Picks(16, 8), Picks(8, 8), Picks(16, 64, 4), Picks(5, 16, 2)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"proj_size": 35}], ids=str
)
def test_every_option_is_as_exact_as_nn(cell, backend, pattern, options):
    if "proj_size" in options and cell is not nn.LSTM:
        options = {"bias": False}
    layer = scattered(cell, 70, 37, **options)
    ours = picked(layer, backend, storage=pattern)
    assert all(ours.stored_weights()[name].pattern == pattern for name in ("weight_ih_l0", "weight_hh_l0"))
    x, hx = torch.randn(3, 4, 70), make_states(layer, 3 if layer.batch_first else 4)
    assert_as_exact_as_nn(ours(x, hx), layer, x, hx)
    packed = pack_sequence([torch.randn(t, 70) for t in (2, 6, 3)], enforce_sorted=False)
    assert_as_exact_as_nn(ours(packed), layer, packed)


@pytest.mark.parametrize(("cell", "backend"), CELLS_AND_BACKENDS)
def test_a_stream_is_the_whole_call(cell, backend):
    ours, hx = picked(scattered(cell), backend), None
    x = torch.randn(5, 2, 5)
    for expected, x_t in zip(ours(x)[0], x, strict=True):
        y_t, hx = ours.step(x_t, hx)
        torch.testing.assert_close(y_t, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("weight_dtype", STORAGE_DTYPES)
def test_narrow_weights(backend, weight_dtype):
    if weight_dtype == torch.float64 and backend == "cpu":
        return
    ours = picked(scattered(nn.LSTM, num_layers=2), backend, weight_dtype=weight_dtype)
    stored = ours.to_dense().requires_grad_(False)
    assert ours.weight_hh_l1_values.dtype == weight_dtype
    x = torch.randn(6, 3, 5)
    assert_as_exact_as_nn(ours(x), stored, x)


@pytest.mark.parametrize("options", [{}, QUANTIZED], ids=["float32", "int8"])
def test_the_same_in_every_copy_and_file(options, tmp_path):
    layer = scattered(nn.GRU, num_layers=2)
    ours = picked(layer, **options)
    x = torch.randn(7, 3, 5)
    expected = ours(x)
    if not options:
        assert_same_bits(ours.to_dense()(x), layer(x))
    other = picked(scattered(nn.GRU, num_layers=2), **options)
    other.load_state_dict(ours.state_dict())
    save_sparse(ours, tmp_path / "file")
    for same in (other, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), load_sparse(layer, tmp_path / "file")):
        assert_same_bits(same(x), expected)
        assert same.weight_ih_l1_picks.dtype == torch.uint8
    assert_same_bits(ours.double().float()(x), expected)
    assert_same_bits(run_after_fork(copy.deepcopy(ours), x), expected)  # which looks at the indices once more


@pytest.mark.parametrize(("cell", "backend"), [(nn.GRU, "cpu"), (nn.LSTM, "reference")])
def test_compilers_take_them(cell, backend):
    ours = picked(scattered(cell, num_layers=2), backend)
    x, hx = torch.randn(6, 3, 5), make_states(ours, 3)
    compiled: Any = torch.compile(ours, fullgraph=True, dynamic=True, backend="eager")
    assert_same_bits(compiled(x, hx), ours(x, hx))
    assert_same_bits(torch.compile(ours.step, fullgraph=True, backend="eager")(x[0], hx), ours.step(x[0], hx))
    exported = torch.export.export(ours, (x,), dynamic_shapes=({0: Dim("T"), 1: Dim("B")},))
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    for program in (exported, torch.export.load(buffer)):
        x = torch.randn(4, 2, 5)
        assert_same_bits(program.module()(x), ours(x))


@pytest.mark.slow("compiler")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # inductor uses it
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated")  # its packages use that
def test_aot_inductor(tmp_path):
    ours = picked(scattered(nn.GRU))
    axes = {0: Dim("T", max=64), 1: Dim("B", max=64)}
    exported = torch.export.export(ours, (torch.randn(6, 3, 5),), dynamic_shapes=(axes,))
    path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "gru.pt2"))
    x = torch.randn(4, 2, 5)
    assert_same_bits(torch._inductor.aoti_load_package(path)(x), ours(x))


def test_backends_agree_on_nan_and_infinity():
    """Also where a padded place of a row without a weight in a bank reads one."""
    layer = scattered(nn.GRU, 40, 37, num_layers=2, bidirectional=True)
    assert_backends_agree_on_nan_and_infinity(layer, storage=PICKS)


@pytest.mark.parametrize("cell", CELLS)
def test_zeros_from_elsewhere_run_in_picks(cell, monkeypatch):
    monkeypatch.setattr(support, "vectors", lambda: "AVX-512 with bytes")
    layer = cell(40, 48).requires_grad_(False)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        prune.l1_unstructured(layer, name, 0.9)
        prune.remove(layer, name)
    fast: Any = to_sparse(layer.eval())
    assert {weight.pattern for name, weight in fast.stored_weights().items() if "weight" in name} == {PICKS}
    assert "storage=Picks(rows=16, bank=32, columns=1)" in repr(fast)
    x = torch.randn(9, 1, 40)
    assert_as_exact_as_nn(fast(x), layer, x)


@pytest.mark.parametrize("part", ["picks", "bank", "columns", "starts"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_write_into_an_index_is_seen(part, backend):
    ours = picked(scattered(nn.GRU), backend)
    x = torch.randn(3, 1, 5)
    ours(x)
    getattr(ours, f"weight_hh_l0_{part}").fill_(77)
    with pytest.raises(ValueError, match=r"picks must|bank must|columns must|starts must"):
        ours(x)


@pytest.mark.skipif(not INTERPRETED, reason="there is a GPU, for tests/kernels/triton/test_gpu_device.py")
def test_triton_computes_the_same():
    layer, x = scattered(nn.GRU), torch.randn(3, 2, 5)
    for ours, other in zip(picked(layer, "triton")(x), picked(layer, "reference")(x), strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-6)
