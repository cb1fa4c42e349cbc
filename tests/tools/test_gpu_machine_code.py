"""What is read from machine code, of a kernel whose code is known; test_gpu_residency.py reads that of our own."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_compilation import without_interpreter

from tools import machine_code
from triton_sparse_rnn.errors import BackendUnavailableError


@pytest.fixture(scope="module")
def compiled():
    """Of machine_code_program.py: the kernel for sm_80, sm_90, sm_100; with 32 registers; and an error."""
    program = Path(__file__).with_name("machine_code_program.py")
    result = subprocess.run([sys.executable, program], env=without_interpreter(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_kernel_for_each_target(compiled, place):
    code = compiled[place]
    assert code["arch"] == machine_code.ARCHITECTURES[place]
    assert code["num_warps"] == 4
    assert 10 <= code["registers"] <= 64
    assert code["spilled_bytes"] == 0
    assert code["barriers"] >= 1  # ptxas may unroll the loop
    assert code["exponentials"] == 4 * code["barriers"]  # 512 elements, 128 threads
    assert 15 < len(code["step"]) < len(code["opcodes"])
    in_loop = {a["arguments"][0]: a["opcode"] for a in code["accesses"] if a["in_time_loop"]}
    assert in_loop == {"x_ptr": "LDG.E.128.STRONG.SYS", "y_ptr": "STG.E.128"}
    before = [a["opcode"] for a in code["accesses"] if a["arguments"] == ["w_ptr"]]
    assert before == ["LDG.E.128"]


def test_a_bound_on_registers_makes_spills(compiled):
    code = compiled[3]
    assert code["registers"] <= 32
    assert code["spilled_bytes"] > 0
    assert any(opcode.startswith("LDL") for opcode in code["step"])
    assert {name for access in code["accesses"] for name in access["arguments"]} == {"w_ptr", "x_ptr", "y_ptr"}


def test_arguments_that_nobody_gave(compiled):
    assert compiled[4] == "types and constants must give each argument of steps once, which is not so of ['BLOCK']"


def test_the_interpreter_compiles_nothing(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendUnavailableError, match="TRITON_INTERPRET=1 makes kernels run in the interpreter"):
        machine_code.compile_for(None, {}, {}, arch=90, num_warps=4)


def test_without_triton(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    assert "triton is not installed" in (machine_code.uncompilable() or "")


def test_without_its_tools(monkeypatch):
    from triton import knobs

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    class Tools:
        ptxas = "ptxas"

        @property
        def cuobjdump(self):
            raise RuntimeError("Cannot find cuobjdump")

    monkeypatch.setattr(knobs, "nvidia", Tools())
    assert machine_code.uncompilable() == "triton has no cuobjdump, which its own wheels contain; install one of these"
