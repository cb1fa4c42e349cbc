"""The threads that help a call (team.py): a pool of them in each process, and what they share with one caller.

Ctrl-C may end a call between any two instructions of Python. So nothing here has to be undone: what a caller does is a
row of single calls of C, each of which happens or does not; it holds no lock in between; and a helper that finds no
work for a while leaves by itself, whether it was let go or not.
"""

from __future__ import annotations

import _thread
import functools
import os
import time
from collections.abc import Sequence
from queue import Empty, SimpleQueue

import numpy as np

from triton_sparse_rnn.kernels.cpu.compilation import compiled_calls, compiled_helper, compiled_share
from triton_sparse_rnn.kernels.cpu.team import NO_MORE, SHARE, TEAM_BYTES, THREADS, TICKET

_PATIENCE_S = 0.1  # of a helper without work; within a call the next piece comes after microseconds


class HelperPool:
    """Threads that wait for teams to help: started when needed, as many as there are processors, and never ended.

    They are `_thread`'s: to start one of `threading`'s takes locks, which an interrupt could leave behind locked.
    """

    def __init__(self) -> None:
        self._teams: SimpleQueue[tuple[np.ndarray, float]] = SimpleQueue()
        self._idle: SimpleQueue[None] = SimpleQueue()  # an entry for each thread that has nothing to do
        self._most = os.cpu_count() or 1
        self._started = 0

    def submit(self, words: np.ndarray) -> None:
        """Send one helper, when there is one, to the team that shares these words."""
        try:
            self._idle.get_nowait()
        except Empty:
            if self._started < self._most:
                try:
                    _thread.start_new_thread(self._work, ())
                except RuntimeError:  # no more threads can be started: fewer help, or nobody
                    if self._started == 0:
                        return
                else:
                    self._started += 1
        self._teams.put((words, time.monotonic()))

    def _work(self) -> None:
        while True:
            help_team(*self._teams.get())
            self._idle.put(None)


@functools.cache
def _pool() -> HelperPool:
    return HelperPool()


os.register_at_fork(after_in_child=_pool.cache_clear)  # the threads of a pool stay behind in the parent


def help_team(words: np.ndarray, since: float) -> int:
    """Take pieces of work until there will be no more, or none came for a while; returns how many were taken.

    Args:
        words: that the team shares.
        since: when help was asked for, by time.monotonic().
    """
    help_out, taken = compiled_helper(), 0
    while words[TICKET] >= 0:  # NO_MORE, or a little more where somebody reached for a chunk meanwhile
        if newly_taken := help_out(words.ctypes.data):
            taken, since = taken + newly_taken, time.monotonic()
        elif time.monotonic() - since > _PATIENCE_S:
            break
    return taken


class Team:
    """Helpers for one call of a layer, to be used in a `with`, which gives the address of the words they share, or 0.

    A helper that has not taken up work is not waited for.
    """

    def __init__(self, helpers: int) -> None:
        self._helpers = helpers

    @staticmethod
    def compile() -> None:
        """Compile what a team runs, before the first one is needed."""
        compiled_share()
        compiled_helper()

    def __enter__(self) -> int:
        if self._helpers == 0:
            return 0
        memory = np.zeros(TEAM_BYTES + 64, np.uint8)
        offset = -memory.ctypes.data % 64  # so that each word has a cache line of its own
        self._words = memory[offset : offset + TEAM_BYTES].view(np.int64)
        self._words[SHARE], self._words[THREADS] = compiled_share().address, self._helpers + 1
        for _ in range(self._helpers):
            _pool().submit(self._words)
        return self._words.ctypes.data

    def __exit__(self, *error: object) -> None:
        if self._helpers:
            self._words[TICKET] = NO_MORE


def run_calls(calls: Sequence[tuple[int, int, int, int]], num_threads: int) -> None:
    """Call kernels, in any order.

    Args:
        calls: addresses of a kernel and of its fields, first and end. No two may write to the same memory.
        num_threads: the most that work on them, the calling one among them.
    """
    words, run = np.array(calls, dtype=np.int64), compiled_calls()
    helpers = min(num_threads, len(calls)) - 1
    if helpers < 1:
        run.ctypes(words.ctypes.data, 0, len(calls))
        return
    Team.compile()
    with Team(helpers) as team:
        compiled_share().ctypes(team, run.address, words.ctypes.data, len(calls))
