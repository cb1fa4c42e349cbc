"""A million steps, twice, while programs are late at random: `python -m bench.gpu.soak --out FILE`.

Two things run. *exchange*: programs that hand over words as the layers do, where one in 64 sleeps before it publishes;
what comes out is known (floor.py). *layer*: a PersistentGRU, beside a random load on another stream that competes
for the cache and the multiprocessors; its results, over all steps, must be the same to the bit in both runs, whose
delays differ. Each writes a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu import floor
from bench.gpu.contenders import convert, floor_programs
from bench.gpu.machine import gpu_facts
from bench.record import append_line
from bench.workloads import Workload

CHUNK = 10_000  # steps of a call
SEEDS = (17, 18)  # of the two runs
Result = dict[str, Any]


def soak_exchange(H: int, steps: int, device: str, programs: int, *, longest_delay_ns: int) -> Result:
    """Hand over H words for `steps` steps, twice."""
    status = floor.new_status(device)
    ends = []
    for seed in SEEDS:
        h = floor.start_values(H, device)
        for i, length in enumerate(_chunks(steps)):
            # Clones, or each call's whole exchange would live as long as its last words.
            h = floor.hand_over(
                h, length, programs, status, longest_delay_ns=longest_delay_ns, seed=seed + 1000 * i
            ).clone()
        ends.append(h.cpu())
    h = floor.start_values(H, "cpu")
    for length in _chunks(steps):
        h = floor.expected(h, length)
    same, right = torch.equal(*ends), all(torch.equal(end, h) for end in ends)
    passed = same and right and status.item() == 0
    return {"H": H, "programs": programs, "identical": same, "right": right, "passed": passed}


def soak_layer(work: Workload, steps: int, load: Callable[[int], None]) -> Result:
    """Run a layer for `steps` steps in calls of work.T, twice.

    Args:
        work: of batch 1; its x is what every call gets, from the state in which the call before it ended.
        steps: in all.
        load: makes the device busy at random, by a seed.
    """
    fast, facts = convert(work)
    x = work.x.to(work.device)
    runs = []
    with torch.inference_mode():
        for seed in SEEDS:
            state, seen = None, []
            for i, length in enumerate(_chunks(steps, work.T)):
                load(seed + 1000 * i)
                y, state = fast(x[:length], state)
                seen.append(_digest(y))
            runs.append(torch.stack(seen).cpu())
    same, finite = torch.equal(*runs), bool(y.isfinite().all())  # pyright: ignore[reportPossiblyUnboundVariable]
    return {"layer": str(work), **facts, "identical": same, "finite": finite, "passed": same and finite}


def _digest(y: Tensor) -> Tensor:
    """Two sums of the bits of y, the second one by place: whole numbers that wrap, so their order does not matter."""
    bits = y.flatten().view(torch.int16 if y.dtype.itemsize == 2 else torch.int32).long()
    return torch.stack([bits.sum(), (bits * torch.arange(1, bits.numel() + 1, device=y.device)).sum()])


def random_load(device: str) -> Callable[[int], None]:
    """Return what queues products of random sizes on a stream of its own, by a seed."""
    stream = torch.cuda.Stream(device)
    matrices = [torch.randn(size, size, device=device) for size in (64, 256, 512, 1024)]

    def load(seed: int) -> None:
        generator = random.Random(seed)
        stream.wait_stream(torch.cuda.current_stream(device))  # of one call at a time, or the queue would grow
        with torch.cuda.stream(stream):
            for _ in range(generator.randrange(300)):
                matrix = generator.choice(matrices)
                torch.mm(matrix, matrix)

    return load


def _chunks(steps: int, length: int = CHUNK) -> Iterator[int]:
    for first in range(0, steps, length):
        yield min(length, steps - first)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a line for each soak; 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines are added to it")
    parser.add_argument("--steps", type=int, default=1_000_000, help="of each run (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps must be 1 or more, got {options.steps}")
    if not torch.cuda.is_available():
        print("bench.gpu.soak: there is no CUDA device that torch can use", file=sys.stderr)
        return 2
    device, H = "cuda", 1024
    programs = floor_programs(H, torch.cuda.get_device_properties(device).multi_processor_count)
    load = random_load(device)
    soaks: dict[str, Callable[[], Result]] = {
        "exchange": lambda: soak_exchange(H, options.steps, device, programs, longest_delay_ns=4_000)
    }
    for dtype in (torch.float32, torch.bfloat16):
        work = Workload(H=H, T=CHUNK, sparsity=0.9, dtype=dtype, device=device)
        soaks[f"layer, {work.dtype_name}"] = lambda work=work: soak_layer(work, options.steps, load)
    failed = False
    for name, soak in soaks.items():
        begin = time.monotonic()
        try:
            result = soak()
        except Exception as error:  # the others are still to run
            result = {"passed": False, "error": repr(error)}
        line = {"soak": name, "steps": options.steps, "seconds": time.monotonic() - begin, **result}
        print(json.dumps(line))
        append_line(options.out, line | gpu_facts())
        failed |= not result["passed"]
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
