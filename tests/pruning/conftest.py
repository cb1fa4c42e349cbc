import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """For every test of this folder."""


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
