"""Runs the programs of one Triton launch at the same time, without a GPU: each in a process of its own.

Triton's interpreter runs the programs of a grid one after another, so a program that waits for a later one would wait
for ever. Here every program has a process whose interpreter runs that program alone, on tensors that all of them share:

    pytest  <-- job, results -->  nursery  -- fork -->  program (0, 0, 0)
                                           -- fork -->  program (1, 0, 0)      ... at once, on shared memory

The nursery is a process that has imported torch and Triton and started no thread, so it may fork: pytest's own has the
pools of torch and numba by then. It is started by the first launch and ends with pytest.

Programs can be made to misbehave (`Conduct`), and every write into the exchange is counted, so a word that is written
twice is seen even when nobody happened to read it in between. What processes cannot show is what a GPU's weaker memory
model makes of plain accesses; that is read from the machine code.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import importlib
import io
import itertools
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from triton_sparse_rnn.kernels.triton.exchange import SENTINEL, new_exchange

ProgramId = tuple[int, int, int]

EXCHANGE = "exchange_ptr"  # the argument [D, S + 1, H + 1, B] of every kernel that waits
DIED = 17  # exit code of a program that was told to die
POLL_S = 0.001  # a program that waits lets others have the core


@dataclasses.dataclass(frozen=True)
class Conduct:
    """What a program does besides its work.

    Args:
        late_s: sleeps this long before it begins.
        delay_s: the longest of the random pauses before each access to the exchange; its stores then become two, of
            random lanes each, with a pause between them.
        seed: of these pauses.
        dies_in_slot: ends in the middle of its first store into this slot of the exchange.
    """

    late_s: float = 0.0
    delay_s: float = 0.0
    seed: int = 0
    dies_in_slot: int | None = None


class Outcome(NamedTuple):
    writes: Tensor  # [programs in the order of the grid, *shape of the exchange]: how often each wrote each word
    exit_codes: dict[ProgramId, int]


class _Job(NamedTuple):
    path: list[str]  # sys.path
    kernel: str
    grid: ProgramId
    arguments: dict[str, Any]
    conduct: dict[ProgramId, Conduct]
    replaced: dict[str, str]
    limit_s: float


class _Report(NamedTuple):
    arguments: dict[str, Any]
    outcome: Outcome
    running: list[ProgramId]  # when the time was over
    errors: dict[ProgramId, str]


def run_programs(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Mapping[str, Any],
    *,
    conduct: Mapping[ProgramId, Conduct] | None = None,
    replaced: Mapping[str, Any] | None = None,
    limit_s: float = 60.0,
) -> Outcome:
    """Do what kernel[grid](**arguments) does, with all programs at once; the tensors are those of the caller.

    Args:
        kernel: a function of triton.jit at the top of a module.
        arguments: by name; tensors are on the CPU.
        conduct: of the programs that misbehave.
        replaced: other functions of triton.jit for global names of its modules.
        limit_s: after which all programs are killed.
    Raises:
        TimeoutError: some were still running then; names them.
        RuntimeError: a program raised; holds its traceback.
    """
    x, y, z = (*grid, 1, 1)[:3]
    names = {name: _name_of(function) for name, function in (replaced or {}).items()}
    job = _Job(list(sys.path), _name_of(kernel), (x, y, z), dict(arguments), dict(conduct or {}), names, limit_s)
    nursery = _nursery()
    nursery.send_bytes(_to_bytes(job))
    report: _Report = _from_bytes(nursery.recv_bytes())
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            value.copy_(report.arguments[name])
    if report.errors:
        raise RuntimeError(
            f"programs {list(report.errors)} raised; the first of them:\n{next(iter(report.errors.values()))}"
        )
    if report.running:
        raise TimeoutError(f"programs {report.running} were still running after {limit_s} s")
    return report.outcome


class InProcesses:
    """Stands in for a kernel: its launches with an exchange are those of `run_programs`, others are the kernel's own.

    `how` holds the keyword arguments of run_programs for the launches to come, `outcomes` those that were.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.how: dict[str, Any] = {}
        self.outcomes: list[Outcome] = []

    def run(self, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        arguments = {**dict(zip(self.kernel.arg_names, args, strict=False)), **options}
        if arguments[EXCHANGE] is None:
            self.kernel.run(*args, grid=grid, warmup=warmup, **options)
            return
        arguments = {name: arguments[name] for name in self.kernel.arg_names}
        self.outcomes.append(run_programs(self.kernel, grid, arguments, **self.how))


@functools.cache
def _nursery() -> Connection:
    ours, theirs = multiprocessing.Pipe()
    here = str(Path(__file__).parent)
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([here, *sys.path]),
        **dict.fromkeys(["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"], "1"),
    }
    code = f"import program_processes; program_processes.serve({theirs.fileno()})"
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, pass_fds=[theirs.fileno()])
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def serve(descriptor: int) -> None:
    """Be the nursery: run the jobs that come until the other end of the connection is closed."""
    torch.set_num_threads(1)
    new_exchange(1, 1, 1, 1, torch.device("cpu"))  # with the first launch Triton imports the rest of itself
    connection = Connection(descriptor)
    while True:
        try:
            job = _from_bytes(connection.recv_bytes())
        except EOFError:
            return
        connection.send_bytes(_to_bytes(_run_job(job)))


def _run_job(job: _Job) -> _Report:
    sys.path[:] = job.path
    kernel = _function(job.kernel)
    for function in list(kernel.fn.__globals__.values()):
        if isinstance(function, interpreter.InterpretedFunction):
            function.rewrite()  # once for all programs
    for value in job.arguments.values():
        if isinstance(value, Tensor):
            value.share_memory_()
    exchange = job.arguments[EXCHANGE]
    programs = list(itertools.product(*map(range, job.grid)))
    writes = torch.zeros(len(programs), *exchange.shape, dtype=torch.int32).share_memory_()

    fork = multiprocessing.get_context("fork")
    started = {}
    for program, counts in zip(programs, writes, strict=True):
        receiver, sender = fork.Pipe(duplex=False)
        process = fork.Process(target=_run_program, args=(job, kernel, program, counts, sender))
        process.start()
        sender.close()
        started[program] = process, receiver
    _wait([process for process, _ in started.values()], job.limit_s)
    running = [program for program, (process, _) in started.items() if process.is_alive()]
    exit_codes, errors = {}, {}
    for program, (process, receiver) in started.items():
        process.kill()
        process.join()
        exit_codes[program] = process.exitcode
        if process.exitcode not in (0, DIED) and program not in running:
            errors[program] = receiver.recv() if receiver.poll() else f"exit code {process.exitcode}"
        process.close()
        receiver.close()
    return _Report(job.arguments, Outcome(writes, exit_codes), running, errors)


def _wait(processes: list[Any], limit_s: float) -> None:
    """Wait until all have ended, or one has failed and others may wait for it, or the time is over."""
    deadline = time.monotonic() + limit_s
    while alive := [process.sentinel for process in processes if process.is_alive()]:
        if any(process.exitcode not in (None, 0, DIED) for process in processes):
            return
        if not wait(alive, max(0.0, deadline - time.monotonic())):
            return


def _modules_of(kernel: Any) -> list[dict[str, Any]]:
    """The globals of the modules of a kernel, and of all device functions that these know."""
    found: list[dict[str, Any]] = []
    left = [kernel]
    while left:
        module = left.pop().fn.__globals__
        if not any(module is other for other in found):
            found.append(module)
            left += [value for value in module.values() if isinstance(value, type(kernel))]
    return found


def _run_program(job: _Job, kernel: Any, program: ProgramId, counts: Tensor, sender: Connection) -> None:
    try:
        for name, function in job.replaced.items():
            places = [module for module in _modules_of(kernel) if name in module]
            if not places:
                raise NameError(f"{job.kernel} has no global {name!r} to replace")
            for module in places:
                module[name] = _function(function)
        conduct = job.conduct.get(program, Conduct())
        runtime: Any = interpreter
        runtime.interpreter_builder.__class__ = _OneProgram
        runtime.interpreter_builder.begin(program, job.grid, job.arguments[EXCHANGE], counts, conduct)
        # What the interpreter would copy back at its end are these same words, perhaps not as they are by then.
        runtime.GridExecutor._restore_args_dev = lambda *arguments: None
        # Done at every call of a device function, this is a third of the time.
        runtime._patch_lang = functools.cache(runtime._patch_lang)
        time.sleep(conduct.late_s)
        kernel[(1,)](**job.arguments)
    except BaseException:
        sender.send(traceback.format_exc())
        sys.exit(1)


class _OneProgram(interpreter.InterpreterBuilder):
    """Grid and memory of Triton's interpreter: one program of the grid, with an eye on the exchange."""

    def begin(self, program: ProgramId, grid: ProgramId, exchange: Tensor, counts: Tensor, conduct: Conduct) -> None:
        self.program, self.grid, self.conduct = program, grid, conduct
        self.exchange, self.counts = exchange, counts.view(-1).numpy()
        self.random = np.random.default_rng([conduct.seed, *program])

    def set_grid_dim(self, nx: int, ny: int, nz: int) -> None:
        super().set_grid_dim(*self.grid)

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        super().set_grid_idx(*self.program)

    def create_masked_load(
        self, ptrs: Any, mask: Any, other: Any, cache_modifier: Any, eviction_policy: Any, is_volatile: Any
    ) -> Any:
        watched = self._words(ptrs, mask.data.astype(bool)).size > 0
        if watched:
            self._pause()
        loaded = super().create_masked_load(ptrs, mask, other, cache_modifier, eviction_policy, is_volatile)
        if watched and (loaded.data == SENTINEL.value).any():
            time.sleep(POLL_S)
        return loaded

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, cache_modifier: Any, eviction_policy: Any) -> None:
        def store(lanes: np.ndarray) -> None:
            np.add.at(self.counts, self._words(ptrs, lanes), 1)
            part = interpreter.TensorHandle(lanes, tl.int1)
            super(_OneProgram, self).create_masked_store(ptrs, value, part, cache_modifier, eviction_policy)

        wanted = mask.data.astype(bool)  # the interpreter also makes integers of them
        words = self._words(ptrs, wanted)
        if words.size == 0:
            super().create_masked_store(ptrs, value, mask, cache_modifier, eviction_policy)
            return
        if self.conduct.dies_in_slot is not None:
            _, slots, rows, B = self.exchange.shape
            if (words // (rows * B) % slots == self.conduct.dies_in_slot).any():
                store(wanted & (np.arange(wanted.size).reshape(wanted.shape) % 2 == 0))
                os._exit(DIED)
        if self.conduct.delay_s:
            early = self.random.random(wanted.shape) < 0.5
            self._pause()
            store(wanted & early)
            self._pause()
            store(wanted & ~early)
        else:
            store(wanted)

    def _words(self, ptrs: Any, lanes: np.ndarray) -> np.ndarray:
        """Which words of the exchange these lanes mean, counted from its beginning; none for other tensors."""
        begin = self.exchange.data_ptr()
        inside = lanes & (ptrs.data >= begin) & (ptrs.data < begin + self.exchange.nbytes)
        return (ptrs.data[inside].astype(np.int64) - begin) // self.exchange.itemsize

    def _pause(self) -> None:
        if self.conduct.delay_s:
            time.sleep(self.random.random() * self.conduct.delay_s)


def _name_of(kernel: Any) -> str:
    return f"{kernel.fn.__module__}:{kernel.fn.__name__}"


def _function(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _to_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)  # unlike a plain pickle it keeps tensors of the same memory together
    return buffer.getvalue()


def _from_bytes(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)
