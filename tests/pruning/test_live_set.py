import gc
import sys
import threading

import pytest

from triton_sparse_rnn.pruning.live_set import LiveSet


class Thing:
    pass


def test_it_has_what_somebody_else_holds():
    things: LiveSet[Thing] = LiveSet()
    one, other = Thing(), Thing()
    things.add(one)
    things.add(one)
    things.add(other)
    assert {*things} == {one, other}
    del other
    gc.collect()
    assert [*things] == [one]
    things.discard(one)
    things.discard(one)
    assert [*things] == []


@pytest.fixture
def _threads_take_turns_often():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_threads_take_turns_often")
def test_it_may_be_read_while_other_threads_change_it():
    things: LiveSet[Thing] = LiveSet()
    held = [Thing() for _ in range(500)]
    for thing in held:
        things.add(thing)
    done = threading.Event()

    def change():
        while not done.is_set():
            others = [Thing() for _ in range(50)]
            for thing in others:
                things.add(thing)
            for thing in others[::2]:
                things.discard(thing)

    threads = [threading.Thread(target=change) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(300):
            assert {*things} >= {*held}
    finally:
        done.set()
        for thread in threads:
            thread.join()
