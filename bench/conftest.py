"""One thread for every contender: what is compared is the work, not how it is shared out. GPU suites need a GPU."""

import time
from pathlib import Path

import pytest
import torch

from bench.gpu.machine import has_faulted
from bench.record import RecordPlugin

STARTED = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a run end in time, and write its rows one by one."""
    parser.addoption(
        "--stop-after", type=float, metavar="SECONDS", help="skip GPU benchmarks that would begin later than this"
    )
    parser.addoption(
        "--record", type=Path, metavar="FILE", help="write a line of JSON for each row, and leave out those that it has"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Let a peer that is not installed be skipped: its benchmark fixture is then not used; note the time."""
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used at all")
    # torch does not lay out weights for cuDNN in bfloat16, and so copies them at every call.
    config.addinivalue_line("filterwarnings", "ignore:RNN module weights are not part of single contiguous chunk")
    config.stash[STARTED] = time.monotonic()
    if (path := config.getoption("--record")) is not None:
        try:
            config.pluginmanager.register(RecordPlugin(path, has_faulted))
        except (OSError, ValueError) as error:
            raise pytest.UsageError(f"--record: {error}") from error


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none, or no time."""
    if item.get_closest_marker("gpu") is None:
        return
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU that torch can use")
    limit = item.config.getoption("--stop-after")
    if limit is not None and time.monotonic() - item.config.stash[STARTED] > limit:
        pytest.skip(f"would begin later than --stop-after={limit:g} seconds")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
