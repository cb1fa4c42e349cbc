"""One thread for every contender: what is compared is the work, not how it is shared out."""

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Let a peer that is not installed be skipped: its benchmark fixture is then not used."""
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used at all")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
