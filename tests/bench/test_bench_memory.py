"""The measuring function sees what is allocated, and only that; the table has a line for each layer."""

import os
import sys

import pytest
import torch

from bench.cpu import memory

MB = 10**6

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process")


def _allocate(count: int) -> torch.Tensor:
    """Bytes that are written to: untouched ones are not resident."""
    return torch.ones(count, dtype=torch.uint8)


@pytest.fixture(autouse=True, scope="module")
def loaded():
    """Code counts too, when it is first used."""
    memory.peak_bytes(lambda: _allocate(MB))


@pytest.mark.parametrize(("size", "keep"), [(3 * MB, False), (50 * MB, True)])
def test_an_allocation_is_seen_whether_it_is_kept_or_freed(size, keep):
    def run():
        tensor = _allocate(size)
        return tensor if keep else None

    for _ in range(2):  # what was freed before is not taken for free
        assert memory.peak_bytes(run) == pytest.approx(size, abs=MB)


def test_an_earlier_peak_is_forgotten():
    _allocate(200 * MB)
    assert memory.peak_bytes(lambda: None) < MB
    assert memory.peak_bytes(lambda: _allocate(5 * MB)) == pytest.approx(5 * MB, abs=MB)


def test_only_the_largest_of_several_counts():
    def run():
        for size in (30 * MB, 4 * MB, 9 * MB):
            _allocate(size)

    assert memory.peak_bytes(run) == pytest.approx(30 * MB, abs=MB)


def test_each_number_has_a_process_of_its_own():
    assert memory.alone(os.getpid) != os.getpid()


def test_table(monkeypatch):
    monkeypatch.setattr(memory, "SIZES", (256,))
    monkeypatch.setattr(memory, "alone", lambda measure, *arguments: measure(*arguments))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in memory.table().splitlines()]
    assert [len(row) for row in cells] == [6] * 5
    assert [row[0] for row in cells[2:]] == ["nn.GRU", "PersistentGRU, float32", "PersistentGRU, int8 weights"]
    dense, float32, int8 = (float(row[2]) for row in cells[2:])
    assert dense == pytest.approx(6 * 256 * (256 + 1) * 4 / 1e6, abs=0.05)
    assert int8 < float32 < dense / 5
