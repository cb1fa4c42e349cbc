"""The launcher: states and gate gradients of a direction of an LSTM, with addresses in place of tensors.

All tensors are float32, and the last axis of each is contiguous; addresses.py looks at them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from triton_sparse_rnn.kernels.cpu.addresses import address_of, address_of_rows
from triton_sparse_rnn.kernels.cpu.compilation import compiled_go_back, kernel_address, kernel_function
from triton_sparse_rnn.kernels.cpu.gate_gradients.dense_products import prepare_product
from triton_sparse_rnn.kernels.cpu.gate_gradients.products import SkippingProduct, lay_out, row_bytes
from triton_sparse_rnn.kernels.cpu.gate_gradients.states import CellFields, CellFormat, PlaceFields
from triton_sparse_rnn.kernels.cpu.gate_gradients.step import LSTM_GATES, GateGradientFields, GateGradientFormat


def place_steps(batch_sizes: Sequence[int], *, reverse: bool, gates_as_taken: bool) -> np.ndarray:
    """Return PlaceFields of every step, in the order in which the direction takes them, [T, 5].

    Args:
        batch_sizes: rows of each step, never more than before it.
        reverse: whether the direction begins with the last step.
        gates_as_taken: whether its gates lie in that order, step after step, and not as the rows of N do.
    """
    rows = np.array(batch_sizes, dtype=np.int64)
    first = np.cumsum(rows) - rows
    if reverse:
        rows, first = rows[::-1], first[::-1]
    before, rows_before = np.roll(first, 1), np.minimum(np.roll(rows, 1), rows)
    rows_before[0] = 0
    gates = np.cumsum(rows) - rows if gates_as_taken else first
    return np.ascontiguousarray(np.stack(PlaceFields(first, rows, gates, before, rows_before), axis=1))


def lstm_cells(steps: np.ndarray, gates: Tensor, c0: Tensor, y: Tensor) -> tuple[Tensor, bool]:
    """Return c after every step, and whether these gates led to y.

    Args:
        steps: of `place_steps`.
        gates: [rows, 4 H], activated.
        c0: [B, H].
        y: [N, H].

    Returns:
        [N, H], contiguous; where the gates are others, c is theirs.
    """
    (N, H), B = y.shape, int(steps[:, 1].max())
    c, right = _scratch(*y.shape), np.zeros(1, dtype=np.int64)
    fields = CellFields(
        steps=steps.ctypes.data,
        units=y.shape[1],
        gates=address_of_rows("gates", gates, N, LSTM_GATES * H),
        gates_bytes=row_bytes(gates),
        c0=address_of_rows("c0", c0, B, H),
        c0_bytes=row_bytes(c0),
        y=address_of_rows("y", y, N, H),
        y_bytes=row_bytes(y),
        c=address_of("c", c, torch.float32, N * H),
        right=right.ctypes.data,
    )
    words = np.array(fields, dtype=np.int64)
    kernel_function(CellFormat())(words.ctypes.data, 0, len(steps))
    return c, bool(right[0] == y.numel())


class GateGradients:
    """Gate gradients of a direction, and what is carried from step to step.

    Attributes, after one of the methods that go back has been called:
        fields: address of the GateGradientFields.
        gates: [N, 4 H].
        dh, dc: [B, H], gradients of the states before the first step.
        zeros: [4], int64, how many of each gate are 0.
    """

    def __init__(
        self,
        format: GateGradientFormat,
        steps: np.ndarray,
        activated: Tensor,
        c: Tensor,
        c0: Tensor,
        grad_y: Tensor,
        grad_h: Tensor,
        grad_c: Tensor,
        thresholds: Tensor | None,
        seed: Tensor,
        group: tuple[int, int] = (1, 1),
    ) -> None:
        """Take over the tensors; compile the kernel, if that has not been done.

        Args:
            format: how small ones are made zero.
            steps: of `place_steps`.
            activated: [rows, 4 H]: i, f, g, o.
            c: [N, H], contiguous.
            c0: [B, H].
            grad_y, grad_h, grad_c: [N, H], [B, H] and [B, H].
            thresholds: [4] or, for groups, [1]; None where `format` selects all.
            seed: [1], int64.
            group: rows and units of a block, of which H may be fewer.
        """
        N, H = c.shape
        self.gates = _scratch(N, LSTM_GATES * H)
        self.zeros = torch.zeros(LSTM_GATES, dtype=torch.int64, device="cpu")
        self.dh, self.dc = (grad.clone(memory_format=torch.contiguous_format) for grad in (grad_h, grad_c))
        thresholds = None if thresholds is None else thresholds.contiguous()
        needed, B = 1 if format.grouped else LSTM_GATES, int(steps[:, 1].max())
        fields = GateGradientFields(
            steps=steps.ctypes.data,
            units=H,
            activated=address_of_rows("activated", activated, N, LSTM_GATES * H),
            activated_bytes=row_bytes(activated),
            c=address_of("c", c, torch.float32, N * H),
            c0=address_of_rows("c0", c0, B, H),
            c0_bytes=row_bytes(c0),
            grad_y=address_of_rows("grad_y", grad_y, N, H),
            grad_y_bytes=row_bytes(grad_y),
            dh=address_of("grad_h", self.dh, torch.float32, B * H),
            dc=address_of("grad_c", self.dc, torch.float32, B * H),
            thresholds=0 if thresholds is None else address_of("thresholds", thresholds, torch.float32, needed),
            seed=address_of("seed", seed, torch.int64, 1),
            group_rows=group[0],
            group_units=group[1],
            gates=address_of_rows("gates", self.gates, N, LSTM_GATES * H),
            zeros=address_of("zeros", self.zeros, torch.int64, LSTM_GATES),
        )
        self._read = (steps, activated, c, c0, grad_y, thresholds, seed)  # these must stay where they are
        self._steps, self._format = steps, format
        self._words = np.array(fields, dtype=np.int64)
        self.fields = self._words.ctypes.data

    def go_back(self, weight_hh: Tensor) -> None:
        """Go back through all steps with dense products."""
        step_back = kernel_function(self._format)
        multiply = prepare_product(weight_hh, len(self.dh), len(self._steps))
        for number in reversed(range(len(self._steps))):
            step_back(self.fields, number, number + 1)
            first, rows = self._steps[number, :2].tolist()
            self.dh[:rows] = multiply(self.gates[first : first + rows])

    def go_back_skipping(self, weight_hh: Tensor) -> None:
        """The same with products that leave out zeros."""
        product = SkippingProduct(self.gates, len(self.dh), lay_out([weight_hh]), [self.dh])
        compiled_go_back()(
            len(self._steps), self._steps.ctypes.data, kernel_address(self._format), self.fields,
            product.kernel, product.fields,
            address_of_rows("gates", self.gates, *self.gates.shape), row_bytes(self.gates),
        )  # fmt: skip


def _scratch(*shape: int) -> Tensor:
    """New memory from numpy, which asks for large pages: of small ones 33 MB take as long as filling them twice."""
    return torch.from_numpy(np.empty(shape, dtype=np.float32))
