import ctypes

import pytest
import torch

_PERTURB = -6  # M_PERTURB of glibc's mallopt: new memory is filled with the complement of a byte
_NAN_BYTES = 0x100  # that is 0xFF, and four of them are a NaN; 0 would fill nothing


@pytest.fixture(autouse=True)
def _same_numbers_and_one_thread():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _new_memory_is_nan():
    """What is read before it is written is NaN, where the C library can do this: scratch of the kernels too."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_PERTURB, _NAN_BYTES)
    yield
    mallopt(_PERTURB, 0)
