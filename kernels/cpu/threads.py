"""The threads that help a call (team.py): a pool of them in each process, and what they share with one caller."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from triton_sparse_rnn.kernels.cpu.compilation import compiled_calls, compiled_helper, compiled_share
from triton_sparse_rnn.kernels.cpu.team import NO_MORE, SHARE, TEAM_BYTES, THREADS, TICKET


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="triton-sparse-rnn")


os.register_at_fork(after_in_child=_pool.cache_clear)  # the threads of a pool stay behind in the parent


class Team:
    """Helpers for one call of a layer, to be used in a `with`, which gives the address of the words they share, or 0.

    A helper that has not taken up work is not waited for.
    """

    def __init__(self, helpers: int) -> None:
        self._helpers = helpers
        self._calls: list[Future[int]] = []

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
        try:
            for _ in range(self._helpers):
                self._calls.append(_pool().submit(_help, self._words))
        except RuntimeError:  # no more threads can be started: fewer help, or nobody
            pass
        except BaseException:  # Ctrl-C: those who were called must not wait for ever
            self.__exit__()
            raise
        return self._words.ctypes.data

    def __exit__(self, *error: object) -> None:
        if self._helpers:
            self._words[TICKET] = NO_MORE
        for call in self._calls:
            call.cancel()


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


def _help(words: np.ndarray) -> int:
    return compiled_helper()(words.ctypes.data)  # the argument keeps the words as long as a helper reads them
