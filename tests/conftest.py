"""Doctests are sought in every module but these, whose equal names pytest would take for one module."""

import os

import pytest
import torch

collect_ignore_glob = ["conftest.py", "*/conftest.py", "*/*/conftest.py"]

if not torch.cuda.is_available():
    # Triton reads this where a kernel is decorated, so it must be there before any test or doctest imports one. The
    # first of pytest's testpaths is this folder, and pytest loads its conftest.py before it collects anything.
    os.environ["TRITON_INTERPRET"] = "1"


SLOW_FOR = {
    "programs": "examples, the demo and commands, each in a process of its own, from end to end",
    "studies": "a training that learns something",
    "processes": "what several processes do to each other, or with another processor's instructions",
    "compiler": "inductor's C++, torch.export's whole traces, and machine code of Triton's kernels",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse a test that is left out of a plain run without a reason."""
    for item in items:
        for marker in item.iter_markers("slow"):
            if marker.args not in [(reason,) for reason in SLOW_FOR]:
                raise pytest.UsageError(f"{item.nodeid}: slow(...) must say one of {', '.join(SLOW_FOR)}")


@pytest.fixture(autouse=True, scope="session")
def programs_are_no_workers():
    """A program that a test starts is no worker of xdist, though a worker starts it: or its benchmarks are disabled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTEST_XDIST_WORKER", raising=False)
        yield


@pytest.fixture
def one_thread():
    """Models this small are slower on several threads, and far slower where others use them too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
