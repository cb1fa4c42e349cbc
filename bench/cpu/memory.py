"""What memory a layer holds, and what converting and running it take besides: `python -m bench.cpu.memory`.

All of it is measured: the resident set of the process, at its largest during a call, less what it was before. Every
number comes from a process of its own, in which libraries are loaded, kernels compiled and one small call made before.
Needs Linux.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from bench.budgets import assert_within_budget
from bench.rows import markdown
from bench.workloads import Workload, pattern_name
from triton_sparse_rnn import PersistentGRU, to_sparse
from triton_sparse_rnn.sparse.patterns import Blocks

SIZES = (1024, 2048)
BATCHES = (1, 16)
T, SPARSITY, PATTERN = 100, 0.9, Blocks(16, 1)
PRECISIONS = {torch.float32: "float32", torch.int8: "int8 weights"}  # as budgets.py names them
HEADINGS = ("layer", "H", "weights", "converting", *(f"a call, T={T} B={B}" for B in BATCHES))


class Converting(NamedTuple):
    """Bytes of the dense layer's parameters, of the converted layer, and that were held besides both at the peak."""

    dense: int
    converted: int
    extra: int


def peak_bytes(run: Callable[[], Any]) -> int:
    """Return how far the resident set rises during `run()` above where it was before; exact to some 0.5 MB.

    What `run` returns is part of it.

    Raises:
        OSError: the system does not tell, as others than Linux do not.
    """
    gc.collect()
    with contextlib.suppress(AttributeError, TypeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)  # or freed memory that malloc keeps would be used again, unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten: see proc(5)
    before = _status_bytes("VmRSS")
    result = run()
    peak = _status_bytes("VmHWM")
    del result
    return peak - before


def measure_converting(H: int, weight_dtype: torch.dtype) -> Converting:
    """Convert a layer with `to_sparse`, and check that it holds what it says it holds, and runs right."""
    work = _workload(H)
    layer = work.layer
    _warm(weight_dtype)
    converted: list[nn.Module] = []
    peak = peak_bytes(lambda: converted.append(to_sparse(layer, weight_dtype=weight_dtype)))
    (module,) = converted
    assert isinstance(module, PersistentGRU)
    storages = {buffer.untyped_storage().data_ptr(): buffer.untyped_storage().nbytes() for buffer in module.buffers()}
    held = sum(storages.values())
    assert module.nbytes == held, f"nbytes says {module.nbytes:,}, the buffers hold {held:,} bytes"
    assert_within_budget(module(work.x)[0], work, PRECISIONS[weight_dtype])
    dense = sum(parameter.nbytes for parameter in layer.parameters())
    return Converting(dense, held, peak - held)


def measure_call(H: int, weight_dtype: torch.dtype | None, B: int) -> int:
    """Return the peak of a call, its y [T, B, H] included; `weight_dtype` None is nn.GRU."""
    work = _workload(H, B)
    layer: nn.Module = work.layer
    if weight_dtype is not None:
        layer = to_sparse(layer, weight_dtype=weight_dtype)
        assert isinstance(layer, PersistentGRU)
        layer.warm_up()
    x = work.x
    with torch.inference_mode():
        layer(x[:1, :1])
        peak = peak_bytes(lambda: layer(x))
        assert_within_budget(layer(x)[0], work, PRECISIONS[weight_dtype or torch.float32])
    return peak


def table() -> str:
    """Return a Markdown table in MB (10^6 bytes)."""
    cells = []
    for H in SIZES:
        rows = {dtype: alone(measure_converting, H, dtype) for dtype in PRECISIONS}
        (dense,) = {row.dense for row in rows.values()}
        cells.append(["nn.GRU", str(H), _mb(dense), "", *_calls(H, None)])
        for dtype, row in rows.items():
            sizes = _mb(row.converted), _mb(row.extra)
            cells.append([f"PersistentGRU, {PRECISIONS[dtype]}", str(H), *sizes, *_calls(H, dtype)])
    return markdown(HEADINGS, cells)


def alone(measure: Callable[..., Any], *arguments: Any) -> Any:
    """Return measure(*arguments), called in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return pool.apply(measure, arguments)


def _calls(H: int, dtype: torch.dtype | None) -> Iterator[str]:
    return (_mb(alone(measure_call, H, dtype, B)) for B in BATCHES)


def _workload(H: int, B: int = 1) -> Workload:
    return Workload(H=H, T=T, B=B, sparsity=SPARSITY, pattern=PATTERN)


def _warm(weight_dtype: torch.dtype) -> None:
    """Load and compile what the first conversion of a process does."""
    small = to_sparse(_workload(64).layer, weight_dtype=weight_dtype)
    assert isinstance(small, PersistentGRU)
    small.warm_up()


def _status_bytes(name: str) -> int:
    """Return a line of /proc/self/status, which are in units of 1,024 bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    (line,) = (line for line in status.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f}"


def main() -> int:
    """Print the table."""
    try:
        print(table())
    except OSError as error:
        print(f"bench.cpu.memory: this system does not tell the peak of its memory ({error})", file=sys.stderr)
        return 2
    print(
        f"\nMB; GRU, I = H, {SPARSITY:.0%} zeros in {pattern_name(PATTERN)}. Converting: at its peak, "
        "besides the dense and the converted weights. A call: at its peak, with y."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
