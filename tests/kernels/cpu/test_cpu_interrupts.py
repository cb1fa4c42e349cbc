"""Ctrl-C at every instruction of a call with helpers: the process calls again rightly, comes to rest, and can exit."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("interrupts_program.py")


@pytest.mark.parametrize("pool", ["warm", "cold"])
@pytest.mark.parametrize("what", ["layer", "products"])
def test_interrupted_at_every_place(what, pool):
    command = [sys.executable, PROGRAM.name, what, pool]
    run = subprocess.run(command, cwd=PROGRAM.parent, timeout=100, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[0]) > 40
