"""Layers with several threads: the same bits as with one, whether helpers come, come late or never come."""

import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from cpu_layers import MODES, RAGGED, Layer
from numba import cfunc, types

from triton_sparse_rnn.kernels.cpu import recurrent_layer, threads
from triton_sparse_rnn.kernels.cpu.team import NO_MORE, TICKET
from triton_sparse_rnn.kernels.cpu.threads import Team, help_team, run_calls


@pytest.fixture(autouse=True)
def _share_small_layers(monkeypatch):
    monkeypatch.setattr(recurrent_layer, "_SHARED_BYTES", 0)


def assert_same_bits(layer, batch_sizes, num_threads, calls=1, quantized=False):
    x, states = layer.random_inputs(batch_sizes)
    sizes = torch.tensor(batch_sizes)
    expected = layer.ready(quantized=quantized)(x, states, sizes)
    shared = layer.ready(quantized=quantized, num_threads=num_threads)
    for _ in range(calls):
        assert all(map(torch.equal, shared(x, states, sizes), expected))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_threads", [2, 4])
@pytest.mark.parametrize("batch_sizes", [[1] * 30, [9] * 10, RAGGED])
def test_same_bits_as_one_thread(mode, num_threads, batch_sizes):
    assert_same_bits(Layer(mode, 21, 150, (5, 3), (4, 3)), batch_sizes, num_threads, calls=3)


@pytest.mark.parametrize("mode", MODES)
def test_fewer_units_than_threads(mode):
    assert_same_bits(Layer(mode, 3, 5, (5, 3), (4, 3)), RAGGED, 4)


@pytest.mark.parametrize("quantized", [False, True])
def test_quantised_and_dense_layers(quantized):
    if quantized:
        layer = Layer("LSTM projected", 21, 150, (5, 3), (16, 4), dtype=torch.int8)
    else:
        layer = Layer("GRU", 21, 150, None, (4, 3))
    assert_same_bits(layer, RAGGED, 3, calls=3, quantized=quantized)


def test_callers_at_once():
    """More of them than the pool has threads, each with a helper of its own."""
    layer = Layer("GRU", 21, 150, (5, 3), (4, 3))
    shared = layer.ready(num_threads=2)
    inputs = [layer.random_inputs([n + 1] * 20) for n in range(6)]
    results = {}

    def work(n):
        results[n] = [shared(inputs[n][0], inputs[n][1], None) for _ in range(10)]

    callers = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(50)
    assert len(results) == 6
    for n, runs in results.items():
        expected = layer.ready()(inputs[n][0], inputs[n][1], None)
        assert all(torch.equal(a, b) for run in runs for a, b in zip(run, expected, strict=True))


class SlowPool:
    """Keeps what is submitted, or runs it after a while."""

    def __init__(self, seconds: float = math.inf):
        self.seconds, self.kept, self.threads = seconds, [], []

    def submit(self, words):
        self.kept.append(words)
        if self.seconds < math.inf:
            self.threads.append(threading.Thread(target=self.run, args=(words,), daemon=True))
            self.threads[-1].start()

    def run(self, words):
        time.sleep(self.seconds)
        help_team(words, time.monotonic())


def test_helpers_that_never_come_are_not_waited_for(monkeypatch):
    pool = SlowPool()
    monkeypatch.setattr(threads, "_pool", lambda: pool)
    assert_same_bits(Layer("GRU", 21, 150, (5, 3), (4, 3)), RAGGED, 3)
    assert len(pool.kept) == 2
    for words in pool.kept:  # after the call: nothing is left to do
        assert help_team(words, time.monotonic()) == 0


@pytest.mark.parametrize("seconds", [0.0, 0.0005, 0.002])
def test_helpers_that_come_late(monkeypatch, seconds):
    pool = SlowPool(seconds)
    monkeypatch.setattr(threads, "_pool", lambda: pool)
    assert_same_bits(Layer("LSTM", 21, 150, (5, 3), (4, 3)), [4] * 100, 3, calls=10)
    for thread in pool.threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in pool.threads)


def test_helpers_are_let_go_after_an_error(monkeypatch):
    pool = SlowPool()
    monkeypatch.setattr(threads, "_pool", lambda: pool)
    with pytest.raises(KeyError), Team(2):
        raise KeyError
    assert [words[TICKET] for words in pool.kept] == [NO_MORE] * 2


def test_a_helper_that_is_not_let_go_leaves():
    """As after an interrupt: neither work nor word of an end ever comes."""
    team = Team(1)
    assert team.__enter__() != 0
    began = time.monotonic()
    assert help_team(team._words, began) == 0
    assert time.monotonic() - began < 20
    assert help_team(team._words, began) == 0  # called long ago: at once


def test_no_thread_can_be_started(monkeypatch):
    pool = threads.HelperPool()
    monkeypatch.setattr(threads, "_pool", lambda: pool)

    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threads._thread, "start_new_thread", refuse)
    assert_same_bits(Layer("GRU", 21, 150, (5, 3), (4, 3)), RAGGED, 3)
    assert pool._teams.empty()


def test_small_layers_call_nobody(monkeypatch):
    monkeypatch.setattr(recurrent_layer, "_SHARED_BYTES", 1 << 22)
    pool = SlowPool()
    monkeypatch.setattr(threads, "_pool", lambda: pool)
    assert_same_bits(Layer("GRU", 21, 150, (5, 3), (4, 3)), RAGGED, 3)
    assert not pool.kept


@cfunc(types.void(types.CPointer(types.int64), types.int64, types.int64))
def count_units(counts, first, end):
    for unit in range(first, end):
        counts[unit] += 1


@pytest.mark.parametrize("num_threads", [1, 2, 4, 50])
@pytest.mark.parametrize("pool", [None, SlowPool(), SlowPool(0.0)])
def test_every_call_is_made_once(num_threads, pool, monkeypatch):
    if pool is not None:
        monkeypatch.setattr(threads, "_pool", lambda: pool)
    counts = torch.zeros(31, dtype=torch.int64)
    assert count_units.address is not None
    calls = [(count_units.address, counts.data_ptr(), n, n + 2) for n in range(0, 30, 2)]
    for _ in range(20):
        run_calls(calls, num_threads)
    assert counts.tolist() == [20] * 30 + [0]
    run_calls([], num_threads)


FORK = """
import os, signal, sys, time, torch
torch.set_num_threads(1)
from cpu_layers import Layer
from triton_sparse_rnn.kernels.cpu import recurrent_layer, threads
recurrent_layer._SHARED_BYTES = 0
layer = Layer("GRU", 21, 150, (5, 3), (4, 3))
inputs = layer.random_inputs([3] * 20)
shared = layer.ready(num_threads=3)
expected = shared(*inputs, None)
same = lambda: all(map(torch.equal, shared(*inputs, None), expected))
child = os.fork()
if child == 0:
    signal.alarm(30)  # a child that hangs is ended
    right = same() and same()
    while threads._pool()._idle.empty():  # until a thread of its own has helped
        time.sleep(0.01)
    os._exit(0 if right else 1)
_, status = os.waitpid(child, 0)
sys.exit(0 if status == 0 and same() else 1)
"""


def test_after_fork():
    """The pool of the parent has been used, and its threads are not in the child."""
    folder = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", FORK]
    run = subprocess.run(command, cwd=folder, env=environment, timeout=100, check=False, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
