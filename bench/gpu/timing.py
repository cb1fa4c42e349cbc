"""How calls are timed on a GPU: by the device's own clock, one after another, eagerly or replayed from a CUDA graph."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP_CALLS = 3


def synchronized(run: Callable[[], Any]) -> Callable[[], Any]:
    """Return a call that ends when the device has done the work: for a clock of the host."""

    def call() -> Any:
        result = run()
        torch.cuda.synchronize()
        return result

    return call


def replayed(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Capture `run()` into a CUDA graph; the returned call replays it, always into the same result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what a first call sets up must not be captured
        for _ in range(WARM_UP_CALLS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def device_times_us(run: Callable[[], Any], seconds: float, most: int = 200) -> list[float]:
    """Time calls between CUDA events, back to back, so that the host is ahead where it is quick enough.

    Args:
        run: a call that has been warmed up.
        seconds: to spend, roughly.
        most: calls. There are 5 at least.
    """
    estimate = _times_us(run, 2)[-1]
    return _times_us(run, max(5, min(most, int(seconds * 1e6 / max(estimate, 1)))))


def median_device_us(run: Callable[[], Any], seconds: float) -> float:
    """Return the median of `device_times_us`, after a few calls that are not counted."""
    for _ in range(WARM_UP_CALLS):
        run()
    return statistics.median(device_times_us(run, seconds))


def _times_us(run: Callable[[], Any], calls: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in itertools.pairwise(events)]
