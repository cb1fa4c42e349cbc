"""Ctrl-C at every instruction of a call with helpers: the process calls again rightly, comes to rest, and can exit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("interrupts_program.py")


@pytest.mark.slow("processes")
@pytest.mark.parametrize("pool", ["warm", "cold"])
@pytest.mark.parametrize("what", ["layer", "products"])
def test_interrupted_at_every_place(what, pool):
    command = [sys.executable, str(PROGRAM), what, pool]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(command, env=environment, timeout=100, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[0]) > 40
