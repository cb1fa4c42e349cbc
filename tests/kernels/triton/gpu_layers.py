"""Random layers for the tests of Triton kernels, in the tensors that the kernels take, and their results in float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from gpu_device import DEVICE
from torch import Tensor

from triton_sparse_rnn.kernels.triton.block_product import project_inputs
from triton_sparse_rnn.kernels.triton.exchange import BETWEEN, NONE, new_exchange
from triton_sparse_rnn.kernels.triton.streamed import choose_streamed_tile, launch_streamed
from triton_sparse_rnn.ops.backends.reference import recurrent_layer
from triton_sparse_rnn.ops.layer_weights import LayerWeights
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.blocks import count_blocks, expand_block_mask
from triton_sparse_rnn.sparse.layer_config import GATES
from triton_sparse_rnn.sparse.row_blocks import row_blocks, stack_directions


def random_matrix(
    gates: int,
    H: int,
    columns: int,
    block_size: tuple[int, int] = (16, 1),
    density: float = 0.4,
    dtype: torch.dtype = torch.float32,
) -> BlockMatrix:
    """A BlockMatrix [gates * H, columns] of about this density, with outputs of the size of a dense one's."""
    kept = torch.rand(gates, *count_blocks(H, columns, block_size)) < density
    mask = expand_block_mask(kept, block_size, H, columns).flatten(0, 1)
    weight = torch.randn(gates * H, columns) * mask / max(1.0, columns * density) ** 0.5
    return BlockMatrix.from_dense(weight.to(DEVICE), block_size, gates=gates, dtype=dtype)


def in_columns_of_16(matrix: BlockMatrix) -> BlockMatrix:
    """The same weights as they are read: where one is not 0, so are the others of its column in the unit group."""
    return BlockMatrix.from_dense(matrix.to_dense(), (16, 1), gates=matrix.gates)


class Layer:
    """A layer with its inputs, for T = len(batch_sizes) steps."""

    def __init__(
        self,
        mode: str,
        H: int,
        batch_sizes: Sequence[int],
        *,
        I: int = 5,
        D: int = 1,
        block_ih: tuple[int, int] = (16, 1),
        block_hh: tuple[int, int] = (16, 1),
        density: float = 0.4,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """dtype: of weights."""
        self.mode, self.H, self.D, self.T, self.B = mode, H, D, len(batch_sizes), batch_sizes[0]
        G = GATES[mode]
        self.weights = [
            LayerWeights(
                random_matrix(G, H, I, block_ih, density, dtype),
                random_matrix(G, H, H, block_hh, density, dtype),
                torch.randn(G * H, device=DEVICE) / 2,
                torch.randn(G * H, device=DEVICE) / 2,
                None,
            )
            for _ in range(D)
        ]
        self.batch_sizes = torch.tensor(batch_sizes)
        self.x = torch.randn(sum(batch_sizes), I, device=DEVICE)
        self.h, self.c = torch.randn(2, D, self.B, H, device=DEVICE)

    def exact(self) -> list[Tensor]:
        """y, h_n and, for an LSTM, c_n, in float64, each column of 16 read where one of its weights is stored."""
        states = [self.h.double(), self.c.double()] if self.mode == "LSTM" else [self.h.double()]
        weights = [
            each._replace(
                weight_ih=in_columns_of_16(each.weight_ih),  # type: ignore[arg-type]
                weight_hh=in_columns_of_16(each.weight_hh),
            )
            for each in self.weights
        ]
        return recurrent_layer(self.x.double(), states, weights, self.batch_sizes, self.mode)

    def slot_bias(self) -> Tensor:
        """[D, H, SLOTS], as the recurrent kernels want it."""
        G = GATES[self.mode]
        ih = torch.stack([w.bias_ih.view(G, self.H) for w in self.weights])  # type: ignore[union-attr]
        hh = torch.stack([w.bias_hh.view(G, self.H) for w in self.weights])  # type: ignore[union-attr]
        if self.mode == "GRU":
            return torch.stack([ih[:, 0] + hh[:, 0], ih[:, 1] + hh[:, 1], hh[:, 2], ih[:, 2]], dim=2)
        return (ih + hh).transpose(1, 2).contiguous()

    def streamed(self, *, steps: int | None = None, fused: bool = False, ragged: bool = True) -> list[Tensor]:
        """Run streamed.py: `steps` at a time with an exchange, or None for step by step."""
        exchange_mode = (NONE if steps is None else BETWEEN).value
        weight_ih = stack_directions([row_blocks(w.weight_ih) for w in self.weights])  # type: ignore[arg-type]
        weight_hh = stack_directions([row_blocks(w.weight_hh) for w in self.weights])
        N = len(self.x)
        y, c = torch.full((N, self.D * self.H), torch.nan, device=DEVICE), self.c.clone()
        inputs: dict[str, Any] = {"sums": None}
        if fused:
            inputs |= {"x": self.x, "weight_ih": weight_ih, "slot_bias": self.slot_bias()}
        else:
            slot_bias = self.slot_bias()
            inputs["sums"] = torch.full((N, *slot_bias.shape), torch.nan, device=DEVICE)
            project_inputs(self.x, weight_ih, slot_bias, inputs["sums"])
        status = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        starts, lengths = self._ragged() if ragged else (None, None)
        h = self.h
        for first in range(0, self.T, steps or 1):
            now = min(steps or 1, self.T - first)
            h_n = torch.full_like(h, torch.nan)
            launch_streamed(
                self.mode,
                choose_streamed_tile(self.B, exchange_mode),
                exchange_mode,
                weight_hh=weight_hh,
                h_in=h,
                c=c,
                exchange=None if steps is None else new_exchange(self.D, now, self.H, self.B, DEVICE),
                y=y,
                h_n=h_n,
                starts=starts,
                lengths=lengths,
                status=status,
                spin_limit=1000,
                first=first,
                steps=now,
                T=self.T,
                **inputs,
            )
            h = h_n
        assert not status.any()
        return [y, h, c] if self.mode == "LSTM" else [y, h]

    def _ragged(self) -> tuple[Tensor, Tensor]:
        sizes = self.batch_sizes.tolist()
        starts = list(itertools.accumulate([0, *sizes[:-1]]))
        lengths = [sum(size > b for size in sizes) for b in range(self.B)]
        return torch.tensor(starts, device=DEVICE), torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


def assert_close(ours: Sequence[Tensor], exact: Sequence[Tensor], tolerance: float = 3e-6) -> None:
    """NaN and infinity are to be where they are in `exact`; memory that nothing was written to holds NaN."""
    for our, right in zip(ours, exact, strict=True):
        torch.testing.assert_close(our.double(), right, rtol=tolerance, atol=tolerance, equal_nan=True)
