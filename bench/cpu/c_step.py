"""A stream step by step, at batch 1: the C export, the package's kernel, and step().

Each is made of a converted layer and x [T, B, I], and advances one step at a time: it never sees the next input, as a
stream does not. The loop over the steps is C's own for the export, and Python's for the others; of the kernel it is
nothing but a call with 13 integers, about 0.3 us.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.contenders import persistent_layer
from bench.workloads import Workload
from triton_sparse_rnn import export_c
from triton_sparse_rnn.kernels.cpu.recurrent_layer import RecurrentLayer

FLAGS = ("-std=c11", "-O3", "-march=native", "-shared", "-fPIC")


def precision(weight_dtype: torch.dtype) -> str:
    """Return the arithmetic to whose budget a result is held."""
    name = str(weight_dtype).removeprefix("torch.")
    return name if weight_dtype == torch.float32 else f"{name} weights"


def ready(label: str, work: Workload, weight_dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    """Convert a workload's layer, and return the call that is timed: one of CONTENDERS, y [T, B, H]."""
    assert work.B == 1, "a stream is one sequence"
    layer = persistent_layer(work.layer, work, backend="cpu", weight_dtype=weight_dtype)
    return CONTENDERS[label](layer, work.x)


def in_c(layer: Any, x: Tensor) -> Callable[[], Tensor]:
    """Return a call of tsr_run(), which is a loop of tsr_step()."""
    with tempfile.TemporaryDirectory() as name:
        export_c(layer, name)
        blob = Path(name, "model.bin").read_bytes()
    library = _library()
    model = ctypes.create_string_buffer(256)  # more than a tsr_model and a tsr_stream are
    stream = ctypes.create_string_buffer(64)
    # Aligned as a program would have it.
    aligned = torch.empty(len(blob) + 64, dtype=torch.uint8)
    begin = -aligned.data_ptr() % 64
    aligned[begin : begin + len(blob)] = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
    if status := library.tsr_open(model, ctypes.c_void_p(aligned.data_ptr() + begin), ctypes.c_size_t(len(blob))):
        raise RuntimeError(library.tsr_message(status).decode())
    size = ctypes.c_size_t.from_buffer(model, 2 * ctypes.sizeof(ctypes.c_size_t))  # stream_bytes
    memory = ctypes.create_string_buffer(size.value)
    if library.tsr_init(stream, model, memory, size):
        raise RuntimeError("a stream of the C export could not begin")
    y = torch.empty(*x.shape[:2], layer.hidden_size)
    places = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_size_t(len(x))
    nothing = ctypes.c_size_t(0)

    def run(*kept: object) -> Tensor:
        library.tsr_reset(stream)
        library.tsr_run(stream, *places, None, nothing)
        return y

    return functools.partial(run, aligned, memory, model)  # which must live as long


def by_kernel(layer: Any, x: Tensor) -> Callable[[], Tensor]:
    """Return a loop of calls of the compiled function with addresses, which is what step() comes to in the end."""
    (stored,) = layer._layers()
    ready = RecurrentLayer(stored.mode, stored.directions, quantized=False)
    (placed,) = ready._place_fields(1, 1)
    states = torch.zeros(2, layer.hidden_size)
    y = torch.empty(*x.shape[:2], layer.hidden_size)
    h, c = (state.data_ptr() for state in states)
    steps = [(x[t].data_ptr(), y[t].data_ptr()) for t in range(len(x))]

    def run() -> Tensor:
        states.zero_()
        for x_t, y_t in steps:
            ready._run(placed.address, 0, 1, 1, 1, x_t, 0, 0, h, c, y_t, h, c)
        return y

    return run


def by_step(layer: Any, x: Tensor) -> Callable[[], Tensor]:
    """Return a loop of calls of step()."""

    def run() -> Tensor:
        outputs, state = [], None
        for x_t in x:
            y_t, state = layer.step(x_t, state)
            outputs.append(y_t)
        return torch.stack(outputs)

    return run


CONTENDERS: dict[str, Callable[[Any, Tensor], Callable[[], Tensor]]] = {
    "C export": in_c,
    "kernel": by_kernel,
    "step()": by_step,
}


@functools.cache
def _library() -> Any:
    """The runtime, compiled for this processor; the benchmark is skipped without a compiler."""
    if shutil.which("cc") is None:
        pytest.skip("the C export needs a C compiler: cc")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_c(torch.nn.Linear(1, 1), folder)
        library = folder / "runtime.so"
        subprocess.run(["cc", *FLAGS, str(folder / "tsr_runtime.c"), "-o", str(library)], check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.tsr_message.restype = ctypes.c_char_p
    return loaded
