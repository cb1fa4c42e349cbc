"""What the machine code of the kernels of gate gradients shows: no spills, and the order that is relied on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_compilation import without_interpreter

from tools.machine_code import ARCHITECTURES

# The same for all tiles, dtypes and rules takes minutes for each target, and is for who changes these kernels:
# PYTHONPATH=. python tests/kernels/triton/gate_gradient_code_program.py 90 all
SOME = [pytest.param(arch, "some", 10, marks=pytest.mark.slow("compiler")) for arch in ARCHITECTURES]


@pytest.mark.parametrize(("arch", "which", "at_least"), [(90, "loop", 2), *SOME])
def test_nothing_spills_and_gate_gradients_are_handed_over_in_order(arch: int, which: str, at_least: int) -> None:
    program = Path(__file__).with_name("gate_gradient_code_program.py")
    result = subprocess.run(
        [sys.executable, program, str(arch), which], env=without_interpreter(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found) >= at_least
    assert {name: problems for name, problems in found.items() if problems} == {}
