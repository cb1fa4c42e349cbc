"""Back-propagation through time of one direction: in how many launches, and whether its programs can be resident.

The whole loop is one launch (loop.py), or a few, each for slices of the batch that fit on the device
together. Where not even one slice does, or the driver refuses, it is a launch and a product for every step.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_sparse_rnn.kernels.triton.exchange import INTERPRETED, new_exchange
from triton_sparse_rnn.kernels.triton.gate_gradients.loop import launch_steps
from triton_sparse_rnn.kernels.triton.gate_gradients.step import BLOCKS, Saved, StepTile, Zeroing, launch_step
from triton_sparse_rnn.kernels.triton.time_loop import SPIN_LIMIT, device_limits, new_status, programs_per_sm

LARGEST_BLOCK = 1024  # units x rows of a tile: what more of them take in registers does not fit
_SIZES = (16, 32, 64)  # of a tile, either way: tl.dot takes no less than 16

_capacities: dict[Any, int] = {}  # programs that are resident at a time, by how the kernel was compiled


def choose_step_tile(hidden_size: int, batch_size: int, zeroing: Zeroing, itemsize: int, sms: int) -> StepTile:
    """Return the tile with which a program reads least in a step, if all programs are resident at once.

    If that is so of none, the tile with the fewest programs. With blocks, a tile has one of them in the batch's axis,
    or those that fill 16 rows, since what is skipped must be zero in all of its rows.

    Args:
        zeroing: no larger blocks than LARGEST_BLOCK, of 64 units or rows at most.
        itemsize: bytes of a gate gradient.
        sms: streaming multiprocessors: one program on each, as it reads as fast as that can.
    """
    tiles = []
    for rows in _SIZES:
        for units in _SIZES:
            if units < zeroing.units or rows < zeroing.rows or rows * units > LARGEST_BLOCK:
                continue
            if zeroing.group == BLOCKS.value and rows != max(16, zeroing.rows):
                continue
            narrow = itemsize == 4 or (zeroing.group == BLOCKS.value and zeroing.units <= 16)
            chunk = 16 if narrow else min(units, 32)
            tiles.append(StepTile(rows, units, chunk, num_warps=4 if rows * units == 256 else 8))

    def programs(tile: StepTile) -> int:
        return -(-hidden_size // tile.units) * -(-batch_size // tile.rows)

    fitting = [tile for tile in tiles if programs(tile) <= sms]
    if fitting:
        return min(fitting, key=lambda tile: tile.rows + tile.units)
    return min(tiles, key=programs)


def new_kept(tile: StepTile, hidden_size: int, batch_size: int, T: int, device: torch.device) -> Tensor:
    """Return the tensor `kept` of step.py, filled for an exchange."""
    return new_exchange(-(-batch_size // tile.rows), T - 1, -(-hidden_size // tile.chunk), 1, device)


class BackwardLoop(NamedTuple):
    """The time loop of one direction.

    Attributes:
        zeroing: what becomes zero.
        tile: of choose_step_tile.
        skips: whether chunks that became zero are left out of the product.
        batch_sizes: rows of every step.
        reverse: whether the direction goes, forward, from the last step to the first.
        precision: of float32 products: "tf32" or "tf32x3".
        multiply: gates [B_t, 4 H] and weight [4 H, H] -> their product in float32, for steps one by one.
    """

    zeroing: Zeroing
    tile: StepTile
    skips: bool
    batch_sizes: tuple[int, ...]
    reverse: bool
    precision: str
    multiply: Callable[[Tensor, Tensor], Tensor]

    def run(self, saved: Saved, weight: Tensor) -> None:
        """Go through all steps: write gate gradients over the gates, those of the first states into dh and dc."""
        B, H = saved.dc.shape
        programs, slices = -(-H // self.tile.units), -(-B // self.tile.rows)
        at_once = min(slices, self._capacity(saved, weight) // programs)
        for first in range(0, slices, at_once) if at_once else ():
            try:
                self._launch(saved, weight, first, min(at_once, slices - first))
            except RuntimeError as error:
                if first > 0 or "cooperative" not in str(error):
                    raise
                _capacities[self._compiled_as(saved, weight)] = at_once = 0  # the driver counts programs too
                break
        if at_once == 0:
            self._run_step_by_step(saved, weight)

    def _capacity(self, saved: Saved, weight: Tensor) -> int:
        """How many programs are on the device at a time; if there were more in a launch, some would wait for ever."""
        device = saved.gates.device
        if INTERPRETED:
            return 1  # they run one after another
        key = self._compiled_as(saved, weight)
        if key not in _capacities:
            compiled = self._launch(saved, weight, 0, 1, only_compile=True)
            _capacities[key] = device_limits(device).sms * programs_per_sm(compiled, self.tile.num_warps, device)
        return _capacities[key]

    def _compiled_as(self, saved: Saved, weight: Tensor) -> tuple[Any, ...]:
        """What the compiled kernel depends on."""
        own = self.zeroing, self.tile, self.skips, self.reverse, self.precision, saved.starts is not None
        return (*own, weight.shape, weight.stride(), saved.grad_y.stride(), weight.dtype, weight.device)

    def _launch(self, saved: Saved, weight: Tensor, first: int, slices: int, *, only_compile: bool = False) -> Any:
        H, tile = saved.dc.shape[1], self.tile
        lists = slices * -(-H // tile.units), -(-H // tile.chunk)
        return launch_steps(
            saved, self.zeroing, tile, weight=weight, scratch=saved.kept.new_empty(lists) if self.skips else None,
            status=status_of(weight.device), spin_limit=SPIN_LIMIT, first_slice=first, slices=slices,
            T=len(self.batch_sizes), reverse=self.reverse, precision=self.precision, only_compile=only_compile,
        )  # fmt: skip

    def _run_step_by_step(self, saved: Saved, weight: Tensor) -> None:
        """A launch and a product for every step."""
        T, N = len(self.batch_sizes), len(saved.gates)
        order = range(T) if self.reverse else reversed(range(T))
        starts = [0, *itertools.accumulate(self.batch_sizes)]
        for t in order:
            launch_step(saved, self.zeroing, self.tile, t, T, reverse=self.reverse)
            gates = saved.gates.view(N, -1)[starts[t] : starts[t + 1]]
            saved.dh[: len(gates)] = self.multiply(gates, weight)


@functools.cache
def status_of(device: torch.device) -> Tensor:
    """The word by which the kernels of a device say that they gave up."""
    return new_status(device)


def raise_if_failed(device: torch.device) -> None:
    """Raise RuntimeError if a program of an earlier launch waited in vain, and forget it."""
    status = status_of(device)
    if status[0]:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # or what still runs would set it again
        status.zero_()
        raise RuntimeError(
            f"an earlier backward with gate_gradient on {device} gave up: a program waited for gate gradients that "
            f"another one did not write in {SPIN_LIMIT} polls. The gradients that it returned hold NaN; this backward "
            "has not run. Something else may hold the GPU (a debugger, another process); go on with the next step, or "
            "use GateGradientSparsity(backend='reference')"
        )
