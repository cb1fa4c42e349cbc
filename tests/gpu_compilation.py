"""Compiling ahead of time, which a process whose kernels are interpreted cannot do."""

import os


def without_interpreter() -> dict[str, str]:
    """Return the environment of a process that compiles."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
