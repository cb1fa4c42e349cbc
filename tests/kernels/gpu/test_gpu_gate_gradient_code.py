"""What the machine code of the kernels of gate gradients shows: no spills, and the order that is relied on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_compilation import without_interpreter

from triton_sparse_rnn.kernels.machine_code import ARCHITECTURES

SOME = pytest.param(90, "some")
ALL = [pytest.param(arch, "all", marks=pytest.mark.slow) for arch in ARCHITECTURES]


@pytest.mark.parametrize(("arch", "which"), [SOME, *ALL])
def test_nothing_spills_and_gate_gradients_are_handed_over_in_order(arch: int, which: str) -> None:
    program = Path(__file__).with_name("gate_gradient_code_program.py")
    result = subprocess.run(
        [sys.executable, program, str(arch), which], env=without_interpreter(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found) > (150 if which == "all" else 10)
    assert {name: problems for name, problems in found.items() if problems} == {}
