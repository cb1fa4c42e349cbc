"""Doctests are sought in every module but these, whose equal names pytest would take for one module."""

import os

import pytest
import torch

collect_ignore_glob = ["conftest.py", "*/conftest.py", "*/*/conftest.py"]

if not torch.cuda.is_available():
    # Triton reads this where a kernel is decorated, so it must be there before any test or doctest imports one. The
    # first of pytest's testpaths is this folder, and pytest loads its conftest.py before it collects anything.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def one_thread():
    """Models this small are slower on several threads, and far slower where others use them too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
