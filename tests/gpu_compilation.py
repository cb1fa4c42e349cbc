"""Compiling ahead of time, which a process whose kernels are interpreted cannot do."""

import os
import sys


def without_interpreter() -> dict[str, str]:
    """Return the environment of a process that compiles and, as this one, finds tools/, which is not installed."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
