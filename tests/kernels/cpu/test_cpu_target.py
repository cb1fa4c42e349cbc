"""Every vector path on this processor, if it has it, and code for processors that this one is not."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import pytest
from llvmlite import ir

from triton_sparse_rnn.kernels.cpu import intrinsics, target
from triton_sparse_rnn.kernels.cpu.gate_gradients.states import CellFormat, emit_cells
from triton_sparse_rnn.kernels.cpu.gate_gradients.step import GateGradientFormat, emit_gate_gradients
from triton_sparse_rnn.kernels.cpu.pack import PackFormat, emit_pack
from triton_sparse_rnn.kernels.cpu.products import emit_product
from triton_sparse_rnn.kernels.cpu.step import StepFormat, emit_step
from triton_sparse_rnn.kernels.cpu.stored_weights import BlockFormat

AVX2 = ["avx", "avx2", "fma", "f16c", "bmi", "bmi2", "popcnt", "sse4.2"]
AVX512 = [*AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"]
PATHS = {  # name of the processor, its features, what the program gets and what it is to print
    "generic": ("generic", [], "all", "generic|False|False|False"),
    "AVX2": ("haswell", AVX2, "all", "AVX2|False|False|True"),
    "AVX-512": ("skylake-avx512", AVX512, "quantised", "AVX-512|False|False|True"),
    "AVX-512 VNNI": ("cascadelake", [*AVX512, "avx512vnni"], "quantised", "AVX-512|True|False|True"),
}
AARCH64 = "aarch64-unknown-linux-gnu"


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Those for the paths of this processor, all at once."""
    here = llvm.get_host_cpu_features()
    is_x86 = llvm.get_process_triple().startswith("x86_64")
    running = {}
    for path, (cpu, features, layers, _) in PATHS.items():
        if is_x86 and all(here.get(feature) for feature in features):
            environment = os.environ | {
                "NUMBA_CPU_NAME": cpu,
                "NUMBA_CPU_FEATURES": ",".join(f"+{feature}" for feature in features),
                "NUMBA_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            }
            running[path] = subprocess.Popen(
                [sys.executable, "target_program.py", layers],
                cwd=Path(__file__).parent,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
    yield running
    for program in running.values():
        program.kill()
        program.communicate()


@pytest.mark.slow("processes")
@pytest.mark.parametrize("path", PATHS)
def test_layers_on_every_vector_path(programs, path):
    if path not in programs:
        pytest.skip(f"this processor does not run {path} code")
    printed, errors = programs[path].communicate(timeout=200)
    assert programs[path].returncode == 0, errors
    assert printed.strip() == PATHS[path][-1]


def test_the_path_of_this_process_is_that_of_its_features():
    expected = "AVX-512" if "avx512f" in target.features() else "AVX2" if "avx2" in target.features() else "generic"
    assert target.vector_path() == expected


@pytest.mark.parametrize(
    ("features", "path", "registers", "half", "multiplies", "permutes"),
    [
        ((), "generic", 4, False, False, False),
        (("neon", "fp-armv8"), "generic", 4, False, False, False),
        (("avx2",), "generic", 4, False, False, False),  # without fma
        (("avx2", "fma", "f16c"), "AVX2", 8, True, False, False),
        (("avx2", "fma", "f16c", "avx512f"), "AVX-512", 32, True, False, False),
        (("avx2", "fma", "f16c", "avx512f", "avx512vnni"), "AVX-512", 32, True, True, False),
        (("avx2", "fma", "f16c", "avx512f", "avx512vbmi"), "AVX-512", 32, True, False, True),
    ],
)
def test_what_features_mean(monkeypatch, features, path, registers, half, multiplies, permutes):
    monkeypatch.setattr(target, "features", lambda: frozenset(features))
    assert target.vector_path() == path
    assert target.registers_for(16) == registers
    assert target.converts_half() == half
    assert target.multiplies_bytes() == multiplies
    assert target.permutes_bytes() == permutes


def emitted(emit, layout):
    """LLVM's text of a kernel for 64-bit ARM."""
    module = ir.Module()
    module.triple = AARCH64
    kernel = ir.Function(module, ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 3), "kernel")
    builder = ir.IRBuilder(kernel.append_basic_block())
    emit(builder, layout, *kernel.args)
    builder.ret_void()
    return str(module)


def assembled(text):
    """Assembly of it, by LLVM's own passes."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        machine = llvm.Target.from_triple(AARCH64).create_target_machine(opt=2)
    except RuntimeError:
        pytest.skip("this LLVM was built without 64-bit ARM")
    module = llvm.parse_assembly(text)
    module.verify()
    return machine.emit_assembly(module)


DTYPES = ["float32", "float16", "bfloat16", "int8", "quantised"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bank", [0, 64])
def test_kernels_for_another_architecture(monkeypatch, dtype, bank):
    """Nothing of x86 is asked for, and no function that may not exist is called."""
    monkeypatch.setattr(target, "features", lambda: frozenset({"neon"}))
    layout = BlockFormat(16, 4, "int8" if dtype == "quantised" else dtype, dtype == "quantised", bank)
    kernels = [(emit_pack, PackFormat.for_product(layout)), (emit_product, layout)]
    for emit, kernel_format in [
        *kernels,
        *((emit_step, StepFormat(mode, layout)) for mode in ("RNN_RELU", "GRU", "LSTM")),
    ]:
        text = emitted(emit, kernel_format)
        assert "x86" not in text
        assembly = assembled(text)
        assert "fmla" in assembly or emit is emit_pack
        assert "\tbl\t" not in assembly  # a call


@pytest.mark.parametrize(
    ("emit", "kernel_format"),
    [
        (emit_cells, CellFormat()),
        (emit_gate_gradients, GateGradientFormat("all")),
        (emit_gate_gradients, GateGradientFormat("small", grouped=True)),
        (emit_gate_gradients, GateGradientFormat("sample")),
        (emit_gate_gradients, GateGradientFormat("sample", grouped=True)),
    ],
)
def test_kernels_of_backward_for_another_architecture(emit, kernel_format):
    text = emitted(emit, kernel_format)
    assert "x86" not in text
    assembly = assembled(text)
    assert "fmla" in assembly
    assert "\tbl\t" not in assembly  # a call


@pytest.mark.parametrize(("triple", "is_x86"), [(AARCH64, False), ("x86_64-unknown-linux-gnu", True)])
def test_pause_where_there_is_one(triple, is_x86):
    module = ir.Module()
    module.triple = triple
    builder = ir.IRBuilder(ir.Function(module, ir.FunctionType(ir.VoidType(), []), "f").append_basic_block())
    pause: Any = intrinsics.pause
    _, generate = pause._defn(None)
    generate(_Context(), builder, None, [])
    assert ("llvm.x86.sse2.pause" in str(module)) == is_x86


class _Context:
    def get_dummy_value(self):
        return ir.Constant(ir.IntType(8).as_pointer(), None)
