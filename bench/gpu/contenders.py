"""Who is timed on a GPU: cuDNN, ours, torch's own block-sparse product, and the floor under them all.

Each of the first two runs eagerly and replayed from a CUDA graph, which costs the host next to nothing. torch.nn is as
its users have it: cuDNN may use TF32 for float32, as torch lets it, and is held to the budget of that.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.budgets import assert_within_budget
from bench.contenders import call_of, persistent_layer
from bench.gpu import floor
from bench.gpu.compiling import compile_seconds
from bench.gpu.machine import copy_bandwidth
from bench.gpu.timing import median_device_us, replayed, synchronized
from bench.time_loop import run_time_loop
from bench.workloads import Workload
from triton_sparse_rnn.doctor import usable_cores
from triton_sparse_rnn.ops.backends.triton import PreparedLayer
from triton_sparse_rnn.sparse.patterns import Blocks

Result = TypeVar("Result")
EVENT_SECONDS = 0.1  # of timing by events, besides what pytest-benchmark does
BUDGET_STEPS, BUDGET_ROWS = 32, 4  # that show how large errors get; the CPU would take long over all of them


def measure(benchmark, work: Workload, contender: GpuContender) -> None:
    """Check the result, then time it: medians of the device's clock go into the fact `device_us`.

    What compiling took before that goes into `compile_s`, 0 where kernels came out of a cache.
    """
    with compile_seconds() as compiled:
        expected, run, facts = contender.prepare(work)
    with torch.inference_mode():
        if contender.graph:
            run = contender.captured(run)
        run().fill_(float("nan"))  # the next call gets this memory, so that what it does not write is seen
        with all_cores():
            error = contender.error(run(), expected)
        names = {"contender": contender.name(work), "precision": contender.precision(work)}
        times = {"max_error": error, "device_us": median_device_us(run, EVENT_SECONDS), "compile_s": sum(compiled)}
        benchmark.group = str(work)
        benchmark.extra_info.update(work.facts() | names | facts | times)
        benchmark(synchronized(run))


class GpuContender:
    """A way to run a layer on a GPU; `str` of it names the benchmark."""

    graph: bool

    def name(self, work: Workload) -> str:
        """Its name in the table."""
        raise NotImplementedError

    def precision(self, work: Workload) -> str:
        """What its result is held to, as budgets.py names it."""
        return "float32" if work.dtype == torch.float32 else f"{work.dtype_name} layer"

    def prepare(self, work: Workload) -> tuple[Workload, Callable[[], Tensor], dict[str, Any]]:
        """Do all that a user does once. Returns the workload whose result is expected, the call, and facts about it.

        The call returns y [T, B, H].
        """
        raise NotImplementedError

    def captured(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return a call that replays `run` from a CUDA graph."""
        return replayed(run)

    def error(self, y: Tensor, expected: Workload) -> float:
        """Fail unless y is right; returns its largest error against float64 on the CPU."""
        like = dataclasses.replace(
            expected, T=min(expected.T, BUDGET_STEPS), B=min(expected.B, BUDGET_ROWS), device="cpu"
        )
        return assert_within_budget(y.cpu(), expected, self.precision(expected), like).largest


class Peer(GpuContender):
    """What is not ours is skipped where torch refuses it; a wrong result still fails."""

    def precision(self, work: Workload) -> str:
        return "tf32" if work.dtype == torch.float32 else super().precision(work)

    def prepare(self, work: Workload) -> tuple[Workload, Callable[[], Tensor], dict[str, Any]]:
        return work, _skip_if_refused(lambda: self.ready(work)), {}

    def captured(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return _skip_if_refused(lambda: replayed(run))

    def ready(self, work: Workload) -> Callable[[], Tensor]:
        """Return the call that is timed, after a first one."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class CuDNN(Peer):
    """PyTorch's own layer, in the dtype of the workload or another one."""

    graph: bool = False
    dtype: torch.dtype | None = None

    def __str__(self) -> str:
        return "nn" + self._differences()

    def name(self, work: Workload) -> str:
        return f"nn.{work.layer_name}" + self._differences()

    def _differences(self) -> str:
        dtype = "" if self.dtype is None else f", {str(self.dtype).removeprefix('torch.')}"
        return dtype + (", CUDA graph" if self.graph else "")

    def ready(self, work: Workload) -> Callable[[], Tensor]:
        dtype = self.dtype or work.dtype
        layer = copy.deepcopy(work.layer).to(work.device, dtype)
        x = work.x.to(work.device, dtype)
        layer(x)
        return lambda: layer(x)[0]


@dataclasses.dataclass(frozen=True)
class Ours(GpuContender):
    """The converted layer on the Triton kernels; with zeros=False it is the layer before pruning that is converted."""

    graph: bool = False
    zeros: bool = True

    def __str__(self) -> str:
        return "ours" + self._differences()

    def name(self, work: Workload) -> str:
        return f"Persistent{work.layer_name}" + self._differences()

    def _differences(self) -> str:
        return (", CUDA graph" if self.graph else "") + ("" if self.zeros else ", 0 % zeros")

    def prepare(self, work: Workload) -> tuple[Workload, Callable[[], Tensor], dict[str, Any]]:
        converted = work if self.zeros else work.without_zeros
        fast, facts = convert(converted)
        if not self.zeros and not facts["on_chip"]:
            pytest.skip(f"without zeros the layer does not stay on the chip: {facts['tile']}")
        return converted, call_of(fast, work), facts


def convert(work: Workload) -> tuple[Any, dict[str, Any]]:
    """Return the persistent layer of a workload, warmed up, and what its kernels report of themselves."""
    fast = persistent_layer(copy.deepcopy(work.layer).to(work.device), work, backend="triton")
    with torch.inference_mode():
        fast(work.x.to(work.device))  # what is reported is how the last call of this batch size ran
    assert fast._plan is not None
    (layer,) = fast._plan.layers
    assert isinstance(layer, PreparedLayer)
    tile = layer.describe(work.B)
    return fast, {"tile": tile, "on_chip": tile.startswith("on chip: ")}


@dataclasses.dataclass(frozen=True)
class TorchBSR(Peer):
    """What torch offers for block-sparse weights: a product for each step, in a loop in Python.

    Its blocks must be square, of 16 rows or more.
    """

    graph: bool = False

    def __str__(self) -> str:
        return "torch BSR per step" + (", CUDA graph" if self.graph else "")

    def name(self, work: Workload) -> str:
        return str(self)

    def ready(self, work: Workload) -> Callable[[], Tensor]:
        layer = copy.deepcopy(work.layer).to(work.device)
        weight_ih, weight_hh, bias_ih, bias_hh = layer.parameters()
        x, bias = work.x.to(work.device), bias_hh.unsqueeze(1)
        blocks = weight_hh.detach().to_sparse_bsr(work.pattern.block_size)

        def recur(h: Tensor) -> Tensor:
            columns = F.pad(h, (0, 0, 0, -len(h) % 16)).t()  # its kernel takes 16 of them or more
            return torch.addmm(bias, blocks, columns)[:, : len(h)].t()

        def run() -> Tensor:
            return run_time_loop(work.cell, F.linear(x, weight_ih, bias_ih), recur)

        recur(x[0])
        return run


@dataclasses.dataclass(frozen=True)
class Floor(GpuContender):
    """Programs that hand over h of one row and compute next to nothing; facts: other times that nobody avoids.

    `bytes_us` is what the device needs to read x, weights and biases and to write y, at the speed at which it copies;
    `projection_us` what torch needs for W_ih x of all steps, whose dense product ours does as well.
    """

    graph = True

    def __str__(self) -> str:
        return "floor"

    def name(self, work: Workload) -> str:
        return "floor: exchange"

    def prepare(self, work: Workload) -> tuple[Workload, Callable[[], Tensor], dict[str, Any]]:
        programs = floor_programs(work.H, torch.cuda.get_device_properties(work.device).multi_processor_count)
        if programs == 1:
            pytest.skip("one program holds the layer: there is nothing to hand over")
        h_in, status = floor.start_values(work.H, work.device), floor.new_status(work.device)
        moved = bytes_moved(work)
        bytes_us = moved / copy_bandwidth() * 1e6
        facts = {"programs": programs, "bytes": moved, "bytes_us": bytes_us, "projection_us": _projection_us(work)}
        return work, lambda: floor.hand_over(h_in, work.T, programs, status), facts

    def error(self, y: Tensor, expected: Workload) -> float:
        wanted = floor.expected(floor.start_values(expected.H, "cpu"), expected.T)
        assert torch.equal(y.cpu(), wanted), "words were lost, so there is nothing to time"
        return 0.0


def floor_programs(H: int, sms: int) -> int:
    """As many programs of 16 units or more as fit side by side: one for each multiprocessor at most."""
    units = 16
    while -(-H // units) > sms:
        units *= 2
    return -(-H // units)


def bytes_moved(work: Workload) -> int:
    """The fewest: x, what is stored of both weights, and biases read once, y written once."""
    stored = sum(int(parameter.count_nonzero()) for parameter in work.layer.parameters())
    return (stored + 2 * work.T * work.B * work.H) * work.dtype.itemsize


def contenders_of(work: Workload) -> list[GpuContender]:
    """All that run a workload, the baseline first."""
    others: list[GpuContender] = [CuDNN(graph=True, dtype=torch.float16)] if work.dtype == torch.bfloat16 else []
    rows, columns = work.pattern.block_size
    if rows == columns and isinstance(work.pattern, Blocks):
        others += [TorchBSR(), TorchBSR(graph=True)]
    ours = [Ours(), Ours(graph=True), Ours(graph=True, zeros=False)]
    return [CuDNN(), CuDNN(graph=True), *others, *ours, Floor()]


def _projection_us(work: Workload) -> float:
    weight_ih, _, bias_ih, _ = copy.deepcopy(work.layer).to(work.device).parameters()
    x = work.x.to(work.device)
    return median_device_us(lambda: F.linear(x, weight_ih, bias_ih), EVENT_SECONDS)


def _skip_if_refused(run: Callable[[], Result]) -> Result:
    try:
        result = run()
        torch.cuda.synchronize()
    except (RuntimeError, NotImplementedError, ValueError, ArithmeticError) as error:
        pytest.skip(f"torch refuses: {error}")
    return result


@contextlib.contextmanager
def all_cores() -> Iterator[None]:
    """For what is computed on the CPU to check a result: nothing is timed meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(usable_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)
