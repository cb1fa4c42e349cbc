"""Interrupt a call that has helpers at each place where Python would notice Ctrl-C, and call again after each.

    PYTHONPATH=tests python tests/kernels/cpu/interrupts_program.py layer|products warm|cold

Warm, a pool of threads is there, and every instruction is a place; cold, it is made anew by each call, and lines are.
Ends with 0 if every call after an interrupt was right and no helper stays at work.
"""

import sys
import time

import torch
from cpu_layers import Layer
from test_cpu_threads import count_units

from triton_sparse_rnn.kernels.cpu import recurrent_layer, threads


def make_layer_call():
    layer = Layer("GRU", 21, 150, (5, 3), (4, 3))
    x, states = layer.random_inputs([3] * 20)
    shared = layer.ready(num_threads=2)
    expected = layer.ready()(x, states, None)

    def call():
        return all(map(torch.equal, shared(x, states, None), expected))

    return call


def make_products_call():
    counts = torch.zeros(30, dtype=torch.int64, device="cpu")
    calls = [(count_units.address, counts.data_ptr(), n, n + 2) for n in range(0, 30, 2)]

    def call():
        counts.zero_()
        threads.run_calls(calls, 2)  # type: ignore[reportArgumentType] - numba's address is no int to pyright
        return bool((counts == 1).all())

    return call


def interrupt(call, place, each_instruction):
    """Call, and interrupt at place number `place`; returns whether the call got so far."""

    def trace(frame, event, argument):
        nonlocal place
        frame.f_trace_opcodes = each_instruction
        if event == ("opcode" if each_instruction else "line"):
            place -= 1
            if place < 0:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def is_at_work():
    """Whether this process takes time while it should sleep."""
    used = time.process_time()
    time.sleep(0.3)
    return time.process_time() - used > 0.01


def main(what, pool):
    recurrent_layer._SHARED_BYTES = 0
    torch.set_num_threads(1)
    call = {"layer": make_layer_call, "products": make_products_call}[what]()
    assert call()
    place = 0
    while interrupt(call, place, pool == "warm"):
        assert call(), f"wrong after an interrupt at place {place}"
        if pool == "cold":
            threads._pool.cache_clear()
        place += 1
    end = time.monotonic() + 60  # where others use the processors, a helper takes longer to find out
    while is_at_work():
        assert time.monotonic() < end, "helpers are still at work"
    assert call()
    print(f"{place} places")


if __name__ == "__main__":
    main(*sys.argv[1:])
