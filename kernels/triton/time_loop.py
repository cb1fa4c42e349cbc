"""The recurrence of one call: which kernel runs it, in how many launches, and whether it can.

In this order, the first that is possible:

    on chip       the weights stay in registers (resident.py): in one program, or in many that exchange h
    streamed      too large for that: weights are read from the L2 cache at every step, programs exchange h
    step by step  one launch a step, where the programs that would exchange h cannot all be resident at a time

A launch takes as many steps as its exchange may hold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_sparse_rnn.kernels.triton.exchange import BETWEEN, INTERPRETED, NONE, WITHIN, new_exchange
from triton_sparse_rnn.kernels.triton.packing import gates_are_tied, longest_list, pack_tiles
from triton_sparse_rnn.kernels.triton.resident import launch_resident
from triton_sparse_rnn.kernels.triton.streamed import choose_streamed_tile, launch_streamed
from triton_sparse_rnn.kernels.triton.tiles import (
    H200,
    RESERVED_BYTES,
    TARGETS,
    Device,
    Residency,
    choose_residency,
)
from triton_sparse_rnn.sparse.row_blocks import UNITS, RowBlocks

SPIN_LIMIT = 2**21  # polls, about a second (an estimate), before a program gives up waiting for h
MOST_PROGRAMS_PER_SM = 16  # 32 on some GPUs, but not on all
_EXCHANGE_BYTES = 2**26  # of one launch: longer sequences take several


class LoopCall(NamedTuple):
    """What all launches of a call share; see resident.py."""

    sums: Tensor
    y: Tensor
    c: Tensor
    starts: Tensor | None
    lengths: Tensor | None
    T: int


class Way(NamedTuple):
    """A way to run the steps of a call.

    Attributes:
        text: for `describe`.
        launch: launch_resident or launch_streamed, with the arguments that are the same in every call.
        exchange_mode: of exchange.py.
        programs: that must be resident at once.
        num_warps: of a program.
    """

    text: str
    launch: Callable[..., Any]
    exchange_mode: int
    programs: int
    num_warps: int


class TimeLoop:
    """The recurrent weights of a layer, or of a stack of layers, ready to run."""

    def __init__(self, mode: str, weights: RowBlocks, *, device: torch.device, bias: Tensor | None = None) -> None:
        """Read the indices, which waits for the device.

        Args:
            mode: nn.RNNBase.mode.
            weights: of all directions; or of all layers, from packing.chain_layers.
            device: where the tensors are.
            bias: [D, H, SLOTS] of a stack, whose chains are layers (WAVEFRONT in resident.py); else None.
        """
        self.spin_limit = SPIN_LIMIT
        self.weights = weights
        self._mode, self._bias = mode, bias
        self._limits = device_limits(device)
        self._longest = longest_list(weights)
        self._tied = bias is None and gates_are_tied(weights)
        self._device = device
        self.status = new_status(device)
        self._packed: dict[tuple[Any, ...], tuple[Tensor, Tensor | None]] = {}
        self._choices: dict[int, Residency | None] = {}
        self._taken: dict[int, str] = {}  # text of the way that the last call took, by batch size
        self._is_resident: dict[Any, bool] = {}

    def run(self, call: LoopCall, h: Tensor) -> Tensor | None:
        """Run all steps and write y, and c of an LSTM in place.

        Returns h_n [D, B, H]; None, and nothing has run, if a stack's programs cannot all be resident.
        """
        for way in self._ways(h.shape[1], call.T):
            if self._can_be_resident(way, call, h):
                h_n = self._run_steps(way, call, h)
                if h_n is not None:
                    self._taken[h.shape[1]] = way.text
                    return h_n
                self._is_resident[_compiled_as(way, call, h)] = False
        return None

    def choose(self, batch_size: int) -> Residency | None:
        """Return how the weights are kept on chip; None if they are not."""
        if batch_size not in self._choices:
            self._choices[batch_size] = choose_residency(
                self._mode,
                self.weights.hidden_size,
                self._longest,
                self.weights.values.element_size(),
                directions=self.weights.directions,
                batch_size=batch_size,
                tied=self._tied,
                picked=self.weights.is_picked,
                chains_wait=self._bias is not None,
                device=self._limits,
            )
        return self._choices[batch_size]

    def describe(self, batch_size: int) -> str:
        """Say how the last call of that batch size ran, or how one would be tried: where the weights are, programs."""
        return self._taken.get(batch_size) or self._ways(batch_size, 2)[0].text

    def raise_if_failed(self) -> None:
        """Raise RuntimeError if a program of an earlier call waited in vain, and forget it.

        Until then all waits are cut short: of calls under way, and in a graph that is replayed, whose message is NaN.
        """
        if self.status[0]:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # or what still runs would set it again
            self.status.zero_()
            raise RuntimeError(
                "an earlier call of this layer gave up: a program waited for states that another one did not write in "
                f"{self.spin_limit} polls. What that call and those after it returned holds NaN; this one has not run. "
                "Something else may hold the GPU (a debugger, another process); call again, or convert with "
                "backend='reference'"
            )

    def _ways(self, B: int, T: int) -> list[Way]:
        """The fastest first. A stack's only one is on chip, and it has none if it does not fit."""
        choice, chained = self.choose(B), self._bias is not None
        if choice is None:
            ways = [] if chained else [self._streamed(B, mode) for mode in (BETWEEN.value, NONE.value)]
        elif chained:
            return [self._on_chip(choice, BETWEEN.value)]
        elif choice.programs == 1:
            return [self._on_chip(choice, WITHIN.value)]
        else:
            ways = [self._on_chip(choice, BETWEEN.value), self._streamed(B, BETWEEN.value)]
            ways += [self._on_chip(choice, NONE.value)]
        return ways[-1:] if T == 1 else ways

    def _on_chip(self, choice: Residency, exchange_mode: int) -> Way:
        programs, tile = choice.programs * choice.directions * choice.resident_slices, choice.tile
        text = f"{_count(programs)} of {tile.named(choice.tiles)}"
        if exchange_mode == NONE.value:
            text = f"step by step: {text}"
        else:
            text = f"on chip: {text}, {choice.on_chip_bytes / 1e6:.2g} MB of weights"
        return Way(text, functools.partial(self._launch_resident, choice), exchange_mode, programs, tile.num_warps)

    def _launch_resident(self, choice: Residency, exchange_mode: int, **arguments: Any) -> Any:
        weights, columns = self._pack(choice)
        more = {"weights": weights, "columns": columns, "bias": self._bias}
        return launch_resident(self._mode, choice, exchange_mode, **more, **arguments)

    def _streamed(self, B: int, exchange_mode: int) -> Way:
        tile = choose_streamed_tile(B, exchange_mode, picked=self.weights.is_picked)
        programs = self.weights.groups * self.weights.directions * -(-B // tile.rows)
        how = "step by step" if exchange_mode == NONE.value else "streamed"
        rows = f" x {tile.rows} rows" if tile.rows > 1 else ""
        text = f"{how}: {_count(programs)} of {UNITS} units{rows}, {tile.num_warps} warps, weights read at every step"
        launch = functools.partial(launch_streamed, self._mode, tile, weight_hh=self.weights)
        return Way(text, launch, exchange_mode, programs, tile.num_warps)

    def _can_be_resident(self, way: Way, call: LoopCall, h: Tensor) -> bool:
        """Whether all programs of a launch that exchange h are on the device at a time; if not, some wait for ever."""
        if way.exchange_mode != BETWEEN.value:
            return True
        if INTERPRETED:
            return False  # programs run one after another
        key = _compiled_as(way, call, h)
        if key not in self._is_resident:
            exchange = h.new_empty(1, dtype=torch.int32)
            compiled = self._launch(way, call, h, h, exchange, 0, 2, only_compile=True)
            self._is_resident[key] = way.programs <= self._limits.sms * programs_per_sm(
                compiled, way.num_warps, h.device
            )
        return self._is_resident[key]

    def _run_steps(self, way: Way, call: LoopCall, h: Tensor) -> Tensor | None:
        """Launch for as many steps as the exchange may hold, until all are done.

        Returns h_n; None, and nothing has run, if the driver refuses a cooperative launch: it counts programs too.
        """
        D, B, H = h.shape
        most = 1 if way.exchange_mode == NONE.value else max(1, _EXCHANGE_BYTES // (4 * D * (H + 1) * B) - 1)
        for first in range(0, call.T, most):
            steps = min(most, call.T - first)
            exchange = None if way.exchange_mode == NONE.value else new_exchange(D, steps, H, B, h.device)
            h_n = torch.empty_like(h)
            try:
                self._launch(way, call, h, h_n, exchange, first, steps)
            except RuntimeError as error:
                if first > 0 or "cooperative" not in str(error):
                    raise
                return None
            h = h_n
        return h

    def _launch(
        self,
        way: Way,
        call: LoopCall,
        h: Tensor,
        h_n: Tensor,
        exchange: Tensor | None,
        first: int,
        steps: int,
        **rest: Any,
    ) -> Any:
        return way.launch(
            way.exchange_mode, **call._asdict(), h_in=h, h_n=h_n, exchange=exchange, status=self.status,
            spin_limit=self.spin_limit, first=first, steps=steps, **rest,
        )  # fmt: skip

    def _pack(self, choice: Residency) -> tuple[Tensor, Tensor | None]:
        """Return the weights in the order of a tile; made at the first call of a batch size that takes this tile."""
        tile, device = choice.tile, self.weights.values.device
        key = tile.groups, tile.ko, tile.tied, choice.tiles
        if key not in self._packed:
            packed = pack_tiles(self.weights, tile, choice.tiles)
            if device.type == "cuda":
                torch.cuda.current_stream().synchronize()  # a later call may be on another stream
            self._packed[key] = packed
        return self._packed[key]


_STATUS_MEMORY: list[Tensor] = []  # never freed: a kernel may still run when its layer is gone
_STATUS_WORDS: list[Tensor] = []


def new_status(device: torch.device) -> Tensor:
    """Return one int32, 0, for kernels to say that they gave up: memory of the host, which it reads without waiting."""
    if device.type != "cuda":
        return torch.zeros(1, dtype=torch.int32, device="cpu")
    if not _STATUS_WORDS:
        _STATUS_MEMORY.append(torch.zeros(1024, 4, dtype=torch.int32, device="cpu", pin_memory=True))
        _STATUS_WORDS.extend(_STATUS_MEMORY[-1][:, :1].unbind())  # 16 bytes apart, as kernels are compiled for
    return _STATUS_WORDS.pop()


@functools.cache
def device_limits(device: torch.device) -> Device:
    """What `choose_residency` needs to know; of an H200 where Triton interprets."""
    if device.type != "cuda":
        return H200
    properties = torch.cuda.get_device_properties(device)
    return Device(
        sms=properties.multi_processor_count,
        target=max(target for target in TARGETS if target <= 10 * properties.major + properties.minor),
        registers=properties.regs_per_multiprocessor,
        threads=properties.max_threads_per_multi_processor,
    )


def programs_per_sm(compiled: Any, num_warps: int, device: torch.device) -> int:
    """How many programs of a compiled kernel are on one multiprocessor at a time."""
    compiled._init_handles()
    shared_bytes = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    return min(
        device_limits(device).programs_per_sm(compiled.n_regs, num_warps),
        shared_bytes // (compiled.metadata.shared + RESERVED_BYTES),
        MOST_PROGRAMS_PER_SM,
    )


def _count(programs: int) -> str:
    return "1 program" if programs == 1 else f"{programs} programs"


def _compiled_as(way: Way, call: LoopCall, h: Tensor) -> tuple[Any, ...]:
    """What a compiled kernel depends on, in one layer."""
    return way.text, call.starts is not None, call.y.dtype
