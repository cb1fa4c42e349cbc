"""What the machine code of the kernels shows that read weights at every step; residency.py is about the other one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_compilation import without_interpreter

from tools.machine_code import ARCHITECTURES


@pytest.mark.slow("compiler")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_spills_and_the_exchange_is_strong(arch):
    program = Path(__file__).with_name("streamed_code_program.py")
    result = subprocess.run(
        [sys.executable, program, str(arch)], env=without_interpreter(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found) > 40
    assert {name: problems for name, problems in found.items() if problems} == {}
