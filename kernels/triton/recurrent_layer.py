"""A recurrent layer on a GPU, all its directions; and a stack of such layers in one launch.

A call projects its inputs (block_product.py, or cuBLAS for a weight that was left dense), and time_loop.py runs the
recurrence. A single step, of a stream for example, is one launch for both (streamed.py).

| tensor           | shape                              | dtype          |                                        |
|------------------|------------------------------------|----------------|----------------------------------------|
| weight_ih        | BlockMatrix [G H, I], or a Tensor  | f32, f16, bf16 | read; a Tensor has the dtype of x      |
| weight_hh        | BlockMatrix [G H, H]               | f32, f16, bf16 | read                                   |
| bias_ih, bias_hh | [G H]                              | floating       | read                                   |
| x                | [N, I]                             | f32, f16, bf16 | read; rows of a step are consecutive   |
| h0, c0           | [D, B, H]                          | dtype of x     | read; c0 by an LSTM                    |
| batch_sizes      | [T], on the CPU                    | int64          | read; never more than the step before  |
| y                | [N, D H]                           | dtype of x     | written                                |
| h_n, c_n         | [D, B, H]                          | dtype of x     | written                                |
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from triton_sparse_rnn.kernels.triton.block_product import project_inputs
from triton_sparse_rnn.kernels.triton.exchange import INTERPRETED, NONE
from triton_sparse_rnn.kernels.triton.packing import chain_layers
from triton_sparse_rnn.kernels.triton.streamed import choose_streamed_tile, launch_streamed
from triton_sparse_rnn.kernels.triton.time_loop import LoopCall, TimeLoop
from triton_sparse_rnn.sparse.layer_config import GATES
from triton_sparse_rnn.sparse.layer_weights import LayerWeights
from triton_sparse_rnn.sparse.row_blocks import MOST_PICKED_COLUMNS, RowBlocks, row_blocks, stack_directions

_MOST_SHAPES = 10000  # of calls that are remembered


class RecurrentLayer:
    """A layer ready to run. Nothing is checked; the tensors must not change."""

    def __init__(self, mode: str, directions: list[LayerWeights], *, device: torch.device) -> None:
        """Bring the weights into the order in which kernels read them, which waits for the device.

        Args:
            mode: nn.RNNBase.mode.
            directions: the second one runs from the last step to the first.
            device: of all tensors; the CPU if Triton interprets.
        """
        self.mode, self.device = mode, device
        self._shapes: set[Any] = set()  # of calls that have run
        with on(device):
            weights = [w.weight_ih if isinstance(w.weight_ih, Tensor) else row_blocks(w.weight_ih) for w in directions]
            blocks = [weight for weight in weights if isinstance(weight, RowBlocks)]
            self.input = stack_directions(blocks) if len(blocks) == len(weights) else None
            self._inputs = weights  # of each direction, if some were left dense
            self.slot_bias = torch.stack([slot_bias(mode, direction) for direction in directions])
            recurrent = stack_directions([row_blocks(direction.weight_hh) for direction in directions])
            self.time_loop = TimeLoop(mode, recurrent, device=device)
            if device.type == "cuda":
                torch.cuda.current_stream().synchronize()  # a later call may be on another stream

    def __call__(self, x: Tensor, states: list[Tensor], batch_sizes: Tensor | None) -> list[Tensor]:
        """Return y, h_n and, for an LSTM, c_n.

        Args:
            x: [N, I], contiguous.
            states: h0 and, for an LSTM, c0, contiguous.
            batch_sizes: [T]; None where every step has B rows.
        Raises:
            RuntimeError: in an earlier call a program waited for h in vain.
        """
        self.time_loop.raise_if_failed()
        (D, B, H), N = states[0].shape, len(x)
        if N == 0:
            return [x.new_empty(0, D * H), *(state.clone() for state in states)]
        with on(self.device):
            refuse_first_in_capture(self._shapes, x, states, batch_sizes)
            if N == B and self.input is not None:
                return self._single_step(x, states)
            call = new_call(self, x, states, batch_sizes, width=D * H)
            h_n = self.time_loop.run(call, states[0].float())
            assert h_n is not None, "steps one by one need no program but themselves"
            return results(call, h_n, states)

    def describe(self, batch_size: int = 1) -> str:
        """Say where the weights are during the time loop, which tile and how many programs."""
        return self.time_loop.describe(batch_size)

    def project(self, x: Tensor) -> Tensor:
        """Return sums [N, D, H, SLOTS]: what each gate gets besides W_hh h."""
        D, H, slots = self.slot_bias.shape
        sums = x.new_empty(len(x), D, H, slots, dtype=torch.float32)
        if self.input is not None:
            project_inputs(x, self.input, self.slot_bias, sums)
            return sums
        for d, weight in enumerate(self._inputs):
            if isinstance(weight, RowBlocks):
                project_inputs(x, weight, self.slot_bias[d : d + 1], sums[:, d : d + 1])
            else:
                sums[:, d] = self.slot_bias[d]
                gates = [0, 1, 3] if self.mode == "GRU" else list(range(slots))
                by_gate = dense_product(x, weight).view(len(x), -1, H).unbind(1)
                for slot, product in zip(gates, by_gate, strict=True):
                    sums[:, d, :, slot] += product
        return sums

    def _single_step(self, x: Tensor, states: list[Tensor]) -> list[Tensor]:
        """Both products and the cell in one launch."""
        (D, B, H), weights = states[0].shape, self.time_loop.weights
        picked = weights.is_picked or (self.input is not None and self.input.is_picked)
        h, c = states[0].float(), written_in_place(states)
        y, h_n = x.new_empty(B, D * H, dtype=torch.float32 if INTERPRETED else x.dtype), torch.empty_like(h)
        launch_streamed(
            self.mode, choose_streamed_tile(B, NONE.value, picked=picked), NONE.value,
            weight_hh=weights, x=x, weight_ih=self.input, slot_bias=self.slot_bias, sums=None, h_in=h, c=c,
            exchange=None, y=y, h_n=h_n, starts=None, lengths=None, status=self.time_loop.status,
            spin_limit=self.time_loop.spin_limit, first=0, steps=1, T=1,
        )  # fmt: skip
        return [result.to(x.dtype) for result in (y, h_n, c)[: 1 + len(states)]]


def dense_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T in float32: what autocast is on for is not this, and sums may exceed float16."""
    with torch.autocast(x.device.type, enabled=False):
        if x.dtype == torch.float32 or x.device.type != "cuda":
            return x.float() @ weight.float().t()
        return torch.mm(x, weight.t(), out_dtype=torch.float32)


class RecurrentStack:
    """Layers of one direction, one above the other, as a wavefront: T + L - 1 steps in a row instead of L T.

    It runs layer by layer where not all programs of all layers can be resident at once.
    """

    def __init__(self, layers: list[RecurrentLayer]) -> None:
        """Take layers for which `can_be_stacked`."""
        first = layers[0]
        self._layers = layers
        self._shapes: set[Any] = set()
        self._refused: set[tuple[int, bool]] = set()  # batch size, and whether ragged: not all programs can be resident
        with on(first.device):
            weights = chain_layers(
                [layer.time_loop.weights for layer in layers], [layer.input for layer in layers[1:] if layer.input]
            )
            bias = torch.cat([layer.slot_bias for layer in layers])
            self.time_loop = TimeLoop(first.mode, weights, device=first.device, bias=bias)
            if first.device.type == "cuda":
                torch.cuda.current_stream().synchronize()

    def __call__(self, x: Tensor, states: list[Tensor], batch_sizes: Tensor | None) -> list[Tensor]:
        """As RecurrentLayer, with states [L, B, H]."""
        self.time_loop.raise_if_failed()
        (_, B, H), N = states[0].shape, len(x)
        kind = B, batch_sizes is not None
        if N > B and kind not in self._refused and self.time_loop.choose(B) is not None:
            with on(self._layers[0].device):
                refuse_first_in_capture(self._shapes, x, states, batch_sizes)
                call = new_call(self._layers[0], x, states, batch_sizes, width=H)
                h_n = self.time_loop.run(call, states[0].float())
                if h_n is not None:
                    return results(call, h_n, states)
            self._refused.add(kind)
        ends = []
        for k, layer in enumerate(self._layers):
            x, *end = layer(x, [state[k : k + 1] for state in states], batch_sizes)
            ends.append(end)
        return [x, *(torch.cat(parts) for parts in zip(*ends, strict=True))]

    def describe(self, batch_size: int = 1) -> str:
        """Say how all layers run."""
        refused = any(batch_size == B for B, _ in self._refused)
        if refused or self.time_loop.choose(batch_size) is None:
            return "; ".join(layer.describe(batch_size) for layer in self._layers)
        return f"{len(self._layers)} layers at once: {self.time_loop.describe(batch_size)}"


def can_be_stacked(layers: list[RecurrentLayer]) -> bool:
    """Whether a RecurrentStack of them is possible: one direction, no ordinary matrix but the lowest input weight."""
    weights = [layer.time_loop.weights for layer in layers] + [layer.input for layer in layers[1:]]
    first = layers[0].time_loop.weights
    return (
        len(layers) > 1
        and all(w is not None and w.directions == 1 and w.values.dtype == first.values.dtype for w in weights)
        and 2 * first.hidden_size + 1 <= MOST_PICKED_COLUMNS
    )


def new_call(
    layer: RecurrentLayer, x: Tensor, states: list[Tensor], batch_sizes: Tensor | None, *, width: int
) -> LoopCall:
    """Project x, and prepare what the time loop writes.

    Args:
        layer: that x goes into.
        x, states, batch_sizes: of the call.
        width: of y.
    """
    B = states[0].shape[1]
    if batch_sizes is not None and int(batch_sizes[-1]) == B:
        batch_sizes = None  # a rectangle after all
    starts = lengths = None
    T = len(x) // B
    if batch_sizes is not None:
        if layer.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a PackedSequence of different lengths cannot be captured in a CUDA graph: its batch_sizes are on the "
                "CPU, and every replay would run with those of the capture. Capture calls with a padded batch"
            )
        T = len(batch_sizes)
        starts = (batch_sizes.cumsum(0) - batch_sizes).to(layer.device)
        # Sizes never increase, so row b has as many steps as there are sizes above b.
        ends = T - torch.searchsorted(batch_sizes.flip(0), torch.arange(B, dtype=torch.int64, device="cpu"), right=True)
        lengths = ends.to(layer.device, torch.int32)
    # The interpreter truncates to bfloat16 where a GPU rounds.
    y = x.new_empty(len(x), width, dtype=torch.float32 if INTERPRETED else x.dtype)
    return LoopCall(layer.project(x), y, written_in_place(states), starts, lengths, T)


def refuse_first_in_capture(shapes: set[Any], x: Tensor, states: list[Tensor], batch_sizes: Tensor | None) -> None:
    """Raise RuntimeError if a CUDA graph captures a call of a shape that has not run before; else note its shape.

    What a first call does cannot be captured: it compiles and loads kernels, and arranges weights for them.
    """
    shape = x.shape, x.dtype, states[0].shape[1], batch_sizes is None
    if shape in shapes:
        return
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"a CUDA graph is being captured, and this layer has not been called with x {tuple(x.shape)} before, which "
            "compiles kernels and arranges weights; call it once, with an input of that size, before the capture"
        )
    if len(shapes) >= _MOST_SHAPES:
        shapes.clear()
    shapes.add(shape)


def written_in_place(states: list[Tensor]) -> Tensor:
    """Return a copy of an LSTM's c in float32; h, which is not written to, where there is no c."""
    return states[1].to(torch.float32, copy=True) if len(states) == 2 else states[0].float()


def results(call: LoopCall, h_n: Tensor, states: list[Tensor]) -> list[Tensor]:
    """Return y, h_n and, for an LSTM, c_n in the dtype of the states."""
    return [result.to(states[0].dtype) for result in (call.y, h_n, call.c)[: 1 + len(states)]]


def slot_bias(mode: str, direction: LayerWeights) -> Tensor:
    """What each gate slot gets besides products, [H, SLOTS]: both biases, but a GRU's n keeps b_hn apart, in slot 2."""
    G, H = GATES[mode], direction.weight_hh.shape[1]
    zeros = torch.zeros(G * H, dtype=torch.float32, device=direction.weight_hh.values.device)
    bias_ih, bias_hh = (zeros if bias is None else bias.float() for bias in (direction.bias_ih, direction.bias_hh))
    ih, hh = bias_ih.view(G, H), bias_hh.view(G, H)
    gates = [ih[0] + hh[0], ih[1] + hh[1], hh[2], ih[2]] if mode == "GRU" else list(ih + hh)
    return torch.stack(gates, dim=1)


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a device the current one: a launch goes to the current one, whatever the tensors say."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
