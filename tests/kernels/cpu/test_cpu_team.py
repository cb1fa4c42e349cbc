"""How chunks are shared, on a kernel that counts: every unit of every offer once, whoever takes it."""

import ctypes
import threading

import numpy as np
import pytest
from numba import cfunc, njit, types

from triton_sparse_rnn.kernels.cpu.compilation import compiled_helper, compiled_share
from triton_sparse_rnn.kernels.cpu.intrinsics import run_kernel, yield_processor
from triton_sparse_rnn.kernels.cpu.team import NO_MORE, SHARE, TEAM_BYTES, THREADS, TICKET

UNITS = 50


@cfunc(types.void(types.CPointer(types.int64), types.int64, types.int64))
def count_units(counts, first, end):
    for unit in range(first, end):
        counts[unit] += 1


@cfunc(types.void(types.CPointer(types.int64), types.int64, types.int64))
def count_units_slowly(counts, first, end):
    yield_processor()  # so that helpers come by, on one core as well
    for unit in range(first, end):
        counts[unit] += 1


@njit(nogil=True)
def offer_often(team, kernel, fields, count, times):
    for _ in range(times):
        run_kernel(team, kernel, fields, count)


@pytest.fixture
def words():
    """Those of a team of the calling thread and three helpers."""
    memory = np.zeros(TEAM_BYTES + 64, np.uint8)
    words = memory[-memory.ctypes.data % 64 :][:TEAM_BYTES].view(np.int64)
    words[SHARE], words[THREADS] = compiled_share().address, 4
    return words


class Helpers:
    """Threads that help out until there is no more."""

    def __init__(self, words, number):
        self.words, self.taken = words, [0] * number
        self.threads = [threading.Thread(target=self.run, args=(n,), daemon=True) for n in range(number)]
        for thread in self.threads:
            thread.start()

    def run(self, n):
        while self.words[TICKET] >= 0:
            self.taken[n] += compiled_helper()(self.words.ctypes.data)

    def dismiss(self):
        self.words[TICKET] = NO_MORE
        for thread in self.threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in self.threads)


def offer(words, counts, units):
    share = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(int(words[SHARE]))  # without the GIL
    share(words.ctypes.data, count_units_slowly.address, counts.ctypes.data, units)


@pytest.mark.parametrize("helpers", [0, 1, 3])
def test_every_unit_once(words, helpers):
    """In 10,000 offers of every size, seen as soon as each one is done."""
    counts, expected = np.zeros(UNITS, np.int64), np.zeros(UNITS, np.int64)
    crowd = Helpers(words, helpers)
    try:
        for phase in range(10_000):
            units = phase % (UNITS + 1)
            offer(words, counts, units)
            expected[:units] += 1
            assert np.array_equal(counts, expected)
    finally:
        crowd.dismiss()
    assert bool(sum(crowd.taken)) == bool(helpers)
    assert np.array_equal(counts, expected)


def test_helpers_come_and_go(words):
    counts = np.zeros(UNITS, np.int64)
    for phase in range(1, 101):
        crowd = Helpers(words, 3)
        offer(words, counts, UNITS)
        crowd.dismiss()
        assert (counts == phase).all()
        words[TICKET] = 0


def test_a_dismissed_helper_takes_nothing(words):
    words[TICKET] = NO_MORE
    assert compiled_helper()(words.ctypes.data) == 0


def test_a_helper_without_work_comes_back(words):
    """So that whoever called it can find out that the caller is gone."""
    assert compiled_helper()(words.ctypes.data) == 0
    assert words[TICKET] == 0


def test_alone_and_in_a_team(words):
    """run_kernel calls the kernel itself where there is no team."""
    counts = np.zeros(UNITS, np.int64)
    offer_often(0, count_units.address, counts.ctypes.data, UNITS, 1)
    offer_often(words.ctypes.data, count_units.address, counts.ctypes.data, UNITS, 1)
    assert (counts == 2).all()


@pytest.mark.parametrize("units", [1, 15, 16, 17, 49])
def test_offers_in_quick_succession(words, units):
    """Nobody takes a chunk twice or one too many, however often two threads reach for the last one."""
    counts = np.zeros(UNITS, np.int64)
    crowd = Helpers(words, 2)
    try:
        offer_often(words.ctypes.data, count_units.address, counts.ctypes.data, units, 50_000)
    finally:
        crowd.dismiss()
    assert counts.tolist() == [50_000] * units + [0] * (UNITS - units)
