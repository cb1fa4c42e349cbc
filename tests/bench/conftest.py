"""The benchmarks are not installed: they are imported from the root of the project."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))


@pytest.fixture
def one_thread():
    """Steps this small are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
