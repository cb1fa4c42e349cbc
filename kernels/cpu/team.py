"""Work shared by threads without a barrier: a thread is waited for only while it has a piece of the work.

The calling thread offers the vectors of a kernel in chunks and takes them itself, one after another. Helpers take
chunks too when they come by. A step is done when all chunks are; a helper that sleeps holds none, so the caller goes on
alone. Waiting, for a chunk in the works or for the next offer, spins a little and then yields the processor.

| word    |                                                                                              |
|---------|----------------------------------------------------------------------------------------------|
| share   | the address of `share_work`, compiled                                                        |
| ticket  | number of chunks * 2^32 + number of the next one; negative when there will be no more offers |
| done    | chunks that are                                                                              |
| kernel, fields, count, threads | what a chunk needs to be run, and between how many threads it is shared |

A chunk belongs to whom the addition of 1 to the ticket gave its number. As long as it is not done the offer stays, so
its words hold still while they are read.
"""

from __future__ import annotations

from collections.abc import Callable

from numba import njit

from triton_sparse_rnn.kernels.cpu.intrinsics import (
    add_shared,
    call_kernel,
    close_over,
    load_shared,
    load_tuple,
    pause,
    store_shared,
    yield_processor,
)

SHARE, TICKET, _DONE, _KERNEL, _FIELDS, _COUNT, THREADS = (
    8 * line for line in range(7)
)  # numbers of int64, a cache line apart
TEAM_BYTES = 7 * 64
NO_MORE = -(1 << 62)
_CALL_WORDS = 4
_CHUNKS_PER_THREAD = 4  # more, and taking them costs; fewer, and one thread ends late
_SPINS = 1000  # some 40 us
_IDLE_SPINS = 1200  # of a helper, before it looks whether it is still wanted: a caller may have been interrupted


def make_share_work(fingerprint: str) -> Callable[..., None]:
    """Return the function, for numba to compile; `fingerprint` as for `layer.make_run_layer`."""

    def share_work(team, kernel, fields, count):
        """Run a kernel for 0, ..., count - 1; `team` is the address of the words."""
        close_over(fingerprint)
        chunks = min(count, load_shared(team + 8 * THREADS) * _CHUNKS_PER_THREAD)
        store_shared(team + 8 * _KERNEL, kernel)
        store_shared(team + 8 * _FIELDS, fields)
        store_shared(team + 8 * _COUNT, count)
        store_shared(team + 8 * _DONE, 0)
        store_shared(team + 8 * TICKET, chunks << 32)
        while _take_chunk(team):
            pass
        spins = 0
        while load_shared(team + 8 * _DONE) < chunks:
            spins = _wait(spins)

    return share_work


def make_help_out(fingerprint: str) -> Callable[[int], int]:
    """Return the function, for numba to compile; `fingerprint` as for `layer.make_run_layer`."""

    def help_out(team):
        """Take chunks until there will be no more, or none came for a moment; returns how many."""
        close_over(fingerprint)
        taken = spins = 0
        while spins < _IDLE_SPINS and load_shared(team + 8 * TICKET) >= 0:
            if _take_chunk(team):
                taken, spins = taken + 1, 0
            else:
                spins = _wait(spins)
        return taken

    return help_out


def make_run_calls(fingerprint: str) -> Callable[..., None]:
    """Return the function, for numba to compile; `fingerprint` as for `layer.make_run_layer`."""

    def run_calls(calls, first, end):
        """A kernel that calls kernels: `calls` is the address of kernel, fields, first and end of each."""
        close_over(fingerprint)
        for number in range(first, end):
            kernel, fields, its_first, its_end = load_tuple(calls + 8 * _CALL_WORDS * number, _CALL_WORDS)
            call_kernel(kernel, fields, its_first, its_end)

    return run_calls


@njit
def _take_chunk(team):
    """Run the next chunk, if there is one; returns whether there was."""
    ticket = load_shared(team + 8 * TICKET)
    if ticket < 0 or ticket & 0xFFFFFFFF >= ticket >> 32:
        return False
    ticket = add_shared(team + 8 * TICKET, 1)  # it may be another offer's by now, or one too many
    chunk, chunks = ticket & 0xFFFFFFFF, ticket >> 32
    if ticket < 0 or chunk >= chunks:
        return False
    count = load_shared(team + 8 * _COUNT)
    first, end = count * chunk // chunks, count * (chunk + 1) // chunks
    call_kernel(load_shared(team + 8 * _KERNEL), load_shared(team + 8 * _FIELDS), first, end)
    add_shared(team + 8 * _DONE, 1)
    return True


@njit
def _wait(spins):
    if spins < _SPINS:
        pause()
    else:
        yield_processor()
    return spins + 1
