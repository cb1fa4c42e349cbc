import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are slower on several threads, and far slower where others use them too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
