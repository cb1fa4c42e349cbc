"""What a weight costs in each pattern: `python -m bench.cpu.patterns [--processes N] recurrence` or `... vectors`.

One thread, batch 1, GRU or LSTM, 90 % zeros, as many weights in every unit group and bank. Contenders take turns, so
that all meet the same machine. A time is that of the fastest turn, which is what remains of it when others use the
machine too; what is shown is the median of several processes. Every result is checked before it is timed, over fewer
steps.

`recurrence` compares picks with blocks, by cell, size and precision. `vectors` is what VECTOR_TIMES and
DENSE_VECTOR_TIME of nn/storage_choice.py are taken from: times of a vector of 16 weights relative to Blocks(16, 1) in
float32, as code for this processor and for older ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import llvmlite.binding as llvm
import torch
from torch import Tensor

from bench.budgets import assert_within_budget
from bench.cpu.recurrence import gates_alone, projection, recurrence, stored, whole_layer
from bench.rows import markdown
from bench.workloads import Workload, pattern_name
from triton_sparse_rnn.kernels.cpu import support
from triton_sparse_rnn.sparse.patterns import Blocks, Pattern
from triton_sparse_rnn.sparse.picks import Picks

STEPS = {256: 1000, 512: 500, 1024: 150, 2048: 50}  # T for each H: a call's start is lost among them
LAYERS = [*(("GRU", H) for H in STEPS), ("LSTM", 512)]  # of `recurrence`
H_OF_VECTORS = 512
TURNS, CHECKED_STEPS, LANES = 25, 20, 16


class Stored(NamedTuple):
    """A way to store and multiply a weight; `precision` as budgets.py names it."""

    pattern: Pattern
    precision: str = "float32"

    def __str__(self) -> str:
        return f"{pattern_name(self.pattern)}, {self.precision}"

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.precision.partition(" ")[0])

    @property
    def quantized(self) -> bool:
        """Whether what it is multiplied with is in int8 too."""
        return self.precision == "int8"


PAIRS = [  # blocks, and the picks to compare with them
    *((Stored(Blocks(16, 1), p), Stored(Picks(), p)) for p in ("float32", "float16 weights", "int8 weights")),
    (Stored(Blocks(16, 4), "int8"), Stored(Picks(16, 64, 4), "int8")),
]
FLOATS = [Blocks(16, 1), Blocks(16, 4), Blocks(16, 16), Blocks(16, 32), Picks(16, 8), Picks(16, 16), Picks(16, 32)]
BYTES = [Blocks(16, 1), Blocks(16, 4), Blocks(16, 16), Picks(16, 8), Picks(16, 16), Picks(16, 32), Picks(16, 64, 4)]
VECTORS = [*(Stored(pattern) for pattern in FLOATS), *(Stored(pattern, "int8") for pattern in BYTES)]
DENSE, GATES_ALONE = "an ordinary matrix, float32", "gates alone"

AVX2 = ("avx", "avx2", "fma", "f16c", "bmi", "bmi2", "popcnt", "sse4.2")
AVX512 = (*AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd")
OLDER = [("skylake-avx512", AVX512), ("haswell", AVX2), ("generic", ())]  # LLVM's names of processors and features


class Measured(NamedTuple):
    """Microseconds a step, and how many vectors of 16 weights a step multiplies by."""

    us: float
    vectors: int

    @property
    def a_vector(self) -> float:
        return self.us / self.vectors


Process = Mapping[str, Measured]  # what one measured, by name
Call = Callable[[], Tensor]


def measure_recurrence(layers: Sequence[tuple[str, int]] = LAYERS) -> dict[str, Measured]:
    """Time each layer in all of PAIRS."""
    measured: dict[str, Measured] = {}
    for cell, H in layers:
        ways = [way for pair in PAIRS for way in pair]
        calls = {_name(cell, H, way): _recurrence(_workload(cell, H, way), way) for way in ways}
        times = _in_turns(calls, STEPS[H])
        measured |= {name: Measured(times[name], _vectors(cell, H, way)) for name, way in zip(calls, ways, strict=True)}
    return measured


def measure_vectors(H: int = H_OF_VECTORS) -> dict[str, Measured]:
    """Time a GRU in all of VECTORS: its recurrence, and its projection; that by torch too."""
    counts = {str(way): _vectors("GRU", H, way) for way in VECTORS} | {DENSE: 3 * H * H // LANES}
    recurrences = {str(way): _recurrence(_workload("GRU", H, way), way) for way in VECTORS}
    projections = {f"{way}, projection": _projection(_workload("GRU", H, way), way) for way in VECTORS}
    work = _workload("GRU", H, VECTORS[0])
    weight, bias = work.layer.get_parameter("weight_ih_l0"), work.layer.get_parameter("bias_ih_l0")
    dense: dict[str, Call] = {}
    if "NUMBA_CPU_NAME" not in os.environ:  # torch's own product is code for this processor whatever that says
        dense[DENSE] = partial(torch.nn.functional.linear, work.x.flatten(0, 1), weight, bias)
    times = _in_turns(recurrences | projections | dense | {GATES_ALONE: gates_alone(work)}, work.T)
    gates_us = times.pop(GATES_ALONE)
    return {
        name: Measured(us - gates_us if name in projections else us, counts[name.removesuffix(", projection")])
        for name, us in times.items()
    }


def recurrence_table(processes: Sequence[Process]) -> str:
    """Compare both of each pair, by stored weight."""
    cells = []
    for cell, H in LAYERS:
        for pair in PAIRS:
            names = [_name(cell, H, way) for way in pair]
            if names[0] not in processes[0]:
                continue
            times = [f"{statistics.median(process[name].us for process in processes):.2f}" for name in names]
            ratios = [process[names[1]].a_vector / process[names[0]].a_vector for process in processes]
            cells.append([f"{cell} H={H}", *map(str, pair), *times, *_median_and_range(ratios)])
    headings = ["layer", "blocks", "picks", "blocks, µs a step", "picks, µs a step", "a weight", "smallest to largest"]
    return markdown(headings, cells)


def vectors_table(processes: Sequence[Process]) -> str:
    """Times of a vector relative to VECTORS[0]: of a recurrence, and of the projection of as many steps."""
    base = str(VECTORS[0])
    cells = []
    for way in map(str, VECTORS):
        of_recurrence = [process[way].a_vector / process[base].a_vector for process in processes]
        cells.append([way, *_median_and_range(of_recurrence), *_of_projection(processes, f"{way}, projection", base)])
    if DENSE in processes[0]:
        cells.append([DENSE, "", "", *_of_projection(processes, DENSE, base)])
    headings = ["stored as", "recurrence", "smallest to largest", "projection", "smallest to largest"]
    ones = [
        f"{statistics.median(1e3 * process[name].a_vector for process in processes):.2f} ns of {part}"
        for name, part in ((base, "the recurrence"), (f"{base}, projection", "the projection"))
    ]
    return f"{markdown(headings, cells)}\n\n1 is {' and '.join(ones)}."


def _of_projection(processes: Sequence[Process], name: str, base: str) -> list[str]:
    base = f"{base}, projection"
    return _median_and_range([process[name].a_vector / process[base].a_vector for process in processes])


def _workload(cell: str, H: int, way: Stored) -> Workload:
    return Workload(cell=cell, H=H, T=STEPS[H], sparsity=0.9, pattern=way.pattern, masks="balanced")


def _name(cell: str, H: int, way: Stored) -> str:
    return f"{cell} H={H}, {way}"


def _vectors(cell: str, H: int, way: Stored) -> int:
    """Of the recurrent weight; that of the input has as many."""
    return int(_workload(cell, H, way).layer.get_parameter("weight_hh_l0").count_nonzero()) // LANES


def _recurrence(work: Workload, way: Stored) -> Call:
    weight_hh = stored(work, "weight_hh_l0", way.dtype)
    return _checked(lambda work: recurrence(work, weight_hh, quantized=way.quantized), work, way)


def _projection(work: Workload, way: Stored) -> Call:
    """With gates; what is checked is the whole layer."""
    weight_ih, weight_hh = (stored(work, name, way.dtype) for name in ("weight_ih_l0", "weight_hh_l0"))
    _checked(lambda work: whole_layer(work, weight_ih, weight_hh, quantized=way.quantized), work, way)
    return projection(work, weight_ih, quantized=way.quantized)


def _checked(make: Callable[[Workload], Call], work: Workload, way: Stored) -> Call:
    """Make the call for a workload, after one for fewer of its steps gave the right result."""
    short = dataclasses.replace(work, T=CHECKED_STEPS)
    assert_within_budget(make(short)(), short, way.precision)
    return make(work)


def _in_turns(calls: Mapping[str, Call], steps: int) -> dict[str, float]:
    """Microseconds a step of each, of its fastest turn."""
    seconds = dict.fromkeys(calls, math.inf)
    for _ in range(TURNS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return {name: value / steps * 1e6 for name, value in seconds.items()}


def _median_and_range(values: Sequence[float]) -> list[str]:
    return [f"{statistics.median(values):.2f}", f"{min(values):.2f} to {max(values):.2f}"]


MEASURES: dict[str, Callable[[], dict[str, Measured]]] = {"recurrence": measure_recurrence, "vectors": measure_vectors}


def measure_here(part: str) -> str:
    """Measure in this process. Returns JSON: for which vectors kernels were compiled, and what was measured."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        return json.dumps({"compiled for": support.vectors(), "measured": MEASURES[part]()})


def measure_alone(part: str, environment: Mapping[str, str]) -> tuple[str, Process]:
    """Return both from a process of its own."""
    command = [sys.executable, "-m", "bench.cpu.patterns", part, "--here"]
    done = subprocess.run(command, env=os.environ | environment, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)
    return found["compiled for"], {name: Measured(*numbers) for name, numbers in found["measured"].items()}


def environments() -> list[dict[str, str]]:
    """Return what makes numba compile for this processor, and for each of OLDER that it can stand in for."""
    here = llvm.get_host_cpu_features()
    older = [(name, features) for name, features in OLDER if all(here.get(feature) for feature in features)]
    flags = [(name, ",".join(f"+{feature}" for feature in features)) for name, features in older]
    return [{}, *({"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": enabled} for name, enabled in flags)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of a part, or what this process measures."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu.patterns", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=MEASURES)
    parser.add_argument("--processes", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--here", action="store_true", help="measure in this process and print JSON")
    options = parser.parse_args(arguments)
    if options.here:
        print(measure_here(options.part))
        return
    of_all = options.part == "vectors"
    for environment in environments() if of_all else [{}]:
        found = [measure_alone(options.part, environment) for _ in range(options.processes)]
        processes = [measured for _, measured in found]
        print(f"## {found[0][0]}\n\n{(vectors_table if of_all else recurrence_table)(processes)}\n", flush=True)


if __name__ == "__main__":
    main()
