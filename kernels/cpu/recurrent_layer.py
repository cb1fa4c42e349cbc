"""The launcher: all directions of a recurrent layer, with addresses in place of tensors.

| tensor           | shape                  | dtype          |                                          |
|------------------|------------------------|----------------|------------------------------------------|
| weight_ih        | a BlockMatrix [G H, I] | support.py     | read; or an ordinary matrix in float32   |
| weight_hh        | a BlockMatrix [G H, P] | support.py     | read                                     |
| weight_hr        | a BlockMatrix [P, H]   | support.py     | read, by an LSTM with proj_size          |
| bias_ih, bias_hh | [G H]                  | float32        | read                                     |
| x                | [N, I]                 | float32        | read; rows of a step are consecutive     |
| h0, c0           | [D, B, P], [D, B, H]   | float32        | read; c0 by an LSTM                      |
| batch_sizes      | [T]                    | int64          | read; never more rows than a step before |
| y                | [N, D P]               | float32        | written                                  |
| h_n, c_n         | [D, B, P], [D, B, H]   | float32        | written                                  |

P is H or proj_size. All are contiguous.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from triton_sparse_rnn.kernels.cpu.compilation import compiled_layer, kernel_address
from triton_sparse_rnn.kernels.cpu.layer import LayerFields
from triton_sparse_rnn.kernels.cpu.matrix import NO_MATRIX, MatrixFields, format_of, matrix_fields, padded_rows
from triton_sparse_rnn.kernels.cpu.multiply import KERNEL_BYTES
from triton_sparse_rnn.kernels.cpu.pack import PackFormat
from triton_sparse_rnn.kernels.cpu.pick_words import PickWords, pick_words
from triton_sparse_rnn.kernels.cpu.step import StepFormat
from triton_sparse_rnn.kernels.cpu.threads import Team
from triton_sparse_rnn.kernels.cpu.vector_code import FLOAT_BYTES
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.layer_weights import LayerWeights

_LINE_BYTES = 64  # a cache line: where a part of scratch begins, so that its vectors do not lie across two
_PROJECTED_BYTES = 1 << 18  # held at a time: read again while in the second-level cache; 64 KB to 1 MB are as fast
_SHARED_BYTES = 1 << 22  # of weights read in a call, from which on it is worth the 20 us that calling for help takes
_BATCH_SHAPES_KEPT = 64


class _Matrices(NamedTuple):
    """W_ih, W_hh and W_hr of a direction, once more as the records that kernels read."""

    ih: MatrixFields
    hh: MatrixFields
    hr: MatrixFields
    records: np.ndarray
    scratch_bytes: int  # for what is filled up


class _PlacedDirection(NamedTuple):
    """LayerFields of a direction, and where its part of the states and of y begins."""

    fields: np.ndarray
    address: int  # of fields
    h_bytes: int
    c_bytes: int
    y_bytes: int


class RecurrentLayer:
    """A layer ready to run: its kernels are compiled, and the addresses of its tensors are taken.

    Weights are looked at when it is made (addresses.py), but not what indices hold: `BlockMatrix.check` does that.
    What it is called with is not: see there. `unreadable_reason` (support.py) must have returned None, and the tensors
    must stay where they are as long as this is called.
    """

    def __init__(self, mode: str, directions: list[LayerWeights], *, quantized: bool, num_threads: int = 1) -> None:
        """Compile what has not been compiled yet.

        Args:
            mode: nn.RNNBase.mode.
            directions: the second one runs from the last step to the first.
            quantized: whether x and h are quantised, for weights in int8.
            num_threads: the most that work on a call, the calling one among them.
        """
        self._directions = directions
        self._has_dense = any(isinstance(direction.weight_ih, Tensor) for direction in directions)
        self._nothing_projected = (None,) * len(directions)
        self._num_threads = num_threads
        self._step_bytes = sum(direction.weight_hh.nbytes for direction in directions)
        matrices = [matrix for direction in directions for matrix in direction if isinstance(matrix, BlockMatrix)]
        self._no_bias = torch.zeros(max(map(padded_rows, matrices)), dtype=torch.float32, device="cpu")
        self._words: list[PickWords] = []  # whose addresses are in records
        self._matrices = [self._read_matrices(mode, direction, quantized) for direction in directions]
        self._fields: dict[tuple[int, int], list[_PlacedDirection]] = {}
        self._run = compiled_layer()
        if num_threads > 1:
            Team.compile()

    def __call__(
        self,
        x: Tensor,
        states: list[Tensor],
        batch_sizes: Tensor | None,
        projected: Sequence[Tensor | None] | None = None,
    ) -> list[Tensor]:
        """Return y, h_n and, for an LSTM, c_n.

        Args:
            x: [N, I].
            states: h0 and, for an LSTM, c0.
            batch_sizes: [T]; None where every step has B rows.
            projected: W_ih x + b_ih of each direction where W_ih is an ordinary matrix, if that is known. Behind its
                N * G * H numbers there is room for a vector.
        """
        # Of a single step most of the time is spent here: no line is without its price.
        N, (D, B, P) = x.shape[0], states[0].shape
        y, ends = x.new_empty(N, D * P), [*map(torch.empty_like, states)]
        if N == 0:
            return [y, *(state.clone() for state in states)]
        if projected is None:
            projected = self._nothing_projected
            if self._has_dense:
                projected = [_dense_projection(x, direction) for direction in self._directions]
        T, sizes = (N // B, 0) if batch_sizes is None else (batch_sizes.shape[0], batch_sizes.data_ptr())
        h0, h_n = states[0].data_ptr(), ends[0].data_ptr()
        c0, c_n = (h0, h_n) if len(ends) == 1 else (states[1].data_ptr(), ends[1].data_ptr())
        places = x.data_ptr(), y.data_ptr(), h0, c0, h_n, c_n
        if 0 in places and x.numel() > 0:
            raise RuntimeError("x and states must have memory, got a tensor whose memory was freed")
        if self._num_threads > 1 and T * self._step_bytes >= _SHARED_BYTES:
            with Team(self._num_threads - 1) as team:
                self._run_directions(team, T, N, B, sizes, places, projected)
        else:
            self._run_directions(0, T, N, B, sizes, places, projected)
        return [y, *ends]

    def _run_directions(
        self, team: int, T: int, N: int, B: int, sizes: int, places: tuple[int, ...], projected: Sequence[Tensor | None]
    ) -> None:
        x, y, h0, c0, h_n, c_n = places  # c0 and c_n are those of h where there is no c
        directions = self._fields.get((N, B)) or self._place_fields(N, B)
        for (_, fields, h_bytes, c_bytes, y_bytes), dense in zip(directions, projected, strict=True):
            enough_memory = self._run(
                fields, team, T, N, B, x, 0 if dense is None else dense.data_ptr(), sizes,
                h0 + h_bytes, c0 + c_bytes, y + y_bytes, h_n + h_bytes, c_n + c_bytes,
            )  # fmt: skip
            if not enough_memory:
                raise MemoryError(f"no memory for what a call with {N} rows of x, {B} at a time, works on")

    def _read_matrices(self, mode: str, direction: LayerWeights, quantized: bool) -> _Matrices:
        """Scratch begins with what is filled up for them."""
        scratch = 0

        def read(weight: BlockMatrix | Tensor | None, bias: Tensor | None, mode: str | None = None) -> MatrixFields:
            nonlocal scratch
            if not isinstance(weight, BlockMatrix):
                return NO_MATRIX
            layout = format_of(weight, quantized)
            pack = kernel_address(PackFormat.for_product(layout))
            product = kernel_address(layout if mode is None else StepFormat(mode, layout))
            bias = self._no_bias if bias is None else bias
            fields = matrix_fields(weight, bias, layout, pack=pack, product=product, scratch=scratch)
            if layout.reads_words:
                words = pick_words(weight)
                fields = fields._replace(**words.addresses())
                self._words.append(words)
            scratch += 2 * _whole_lines(fields.gates * fields.gate_bytes)
            return fields

        ih = read(direction.weight_ih, direction.bias_ih)
        hh = read(direction.weight_hh, direction.bias_hh, mode)
        hr = read(direction.weight_hr, None)
        return _Matrices(ih, hh, hr, np.array([ih, hh, hr], dtype=np.int64), scratch)

    def _place_fields(self, N: int, B: int) -> list[_PlacedDirection]:
        """Lay out each direction for batches of B and N rows in all, and keep that."""
        placed = []
        for d, matrices in enumerate(self._matrices):
            fields = np.array(_place(matrices, N, B, d, len(self._matrices)), dtype=np.int64)
            h_bytes, c_bytes = matrices.hh.inputs * FLOAT_BYTES, matrices.hh.row_bytes
            placed.append(_PlacedDirection(fields, fields.ctypes.data, d * B * h_bytes, d * B * c_bytes, d * h_bytes))
        if len(self._fields) >= _BATCH_SHAPES_KEPT:
            self._fields.clear()
        self._fields[N, B] = placed  # whole: other threads may be reading
        return placed


def _place(matrices: _Matrices, N: int, B: int, direction: int, directions: int) -> LayerFields:
    """Divide up scratch memory."""
    ih, hh, hr = matrices[:3]
    is_dense = ih.product == 0
    projected_gate_bytes = hh.row_bytes if is_dense else ih.gate_bytes
    projected_bytes = hh.gates * projected_gate_bytes
    tiles = max(1, _PROJECTED_BYTES // (projected_bytes * 8 * B))  # of 8 steps
    window = 0 if is_dense else min(N, tiles * 8 * B)
    input_bytes = FLOAT_BYTES * max(hh.padded_inputs, hr.padded_inputs)
    state_bytes = _whole_lines(max(hh.gate_bytes, hr.gate_bytes, input_bytes))

    parts = {"constants": matrices.scratch_bytes, "projected": window * projected_bytes}
    parts |= dict.fromkeys(("h", "h_next", "c", "hidden"), B * state_bytes)
    parts["packed"] = max(window * ih.input_bytes, B * hh.input_bytes, B * hr.input_bytes)
    parts |= {"packed_scales": max(window, B) * FLOAT_BYTES, "kernel": KERNEL_BYTES}
    *places, scratch_bytes = itertools.accumulate(map(_whole_lines, parts.values()), initial=0)
    address, matrix_bytes = matrices.records.ctypes.data, matrices.records.strides[0]
    return LayerFields(
        ih=address,
        hh=address + matrix_bytes,
        hr=address + 2 * matrix_bytes,
        reverse=direction,
        has_cell_state=hh.gates == 4,
        has_projection=hr.product != 0,
        x_bytes=ih.inputs * FLOAT_BYTES,
        y_bytes=directions * hh.inputs * FLOAT_BYTES,
        state_bytes=state_bytes,
        projected_bytes=projected_bytes,
        projected_gate_bytes=projected_gate_bytes,
        window=window,
        scratch_bytes=scratch_bytes,
        **{name: place for name, place in zip(parts, places, strict=True) if name != "constants"},
    )


def _whole_lines(size: int) -> int:
    return -(-size // _LINE_BYTES) * _LINE_BYTES


def _dense_projection(x: Tensor, direction: LayerWeights) -> Tensor | None:
    """W_ih x + b_ih where W_ih is an ordinary matrix, with room behind it."""
    weight = direction.weight_ih
    if isinstance(weight, BlockMatrix):
        return None
    size = x.shape[0] * weight.shape[0]
    projected = x.new_empty(size + direction.weight_hh.block_size[0])
    product = projected[:size].view(x.shape[0], weight.shape[0])
    if direction.bias_ih is None:
        torch.mm(x, weight.t(), out=product)
    else:
        torch.addmm(direction.bias_ih, x, weight.t(), out=product)
    return projected
