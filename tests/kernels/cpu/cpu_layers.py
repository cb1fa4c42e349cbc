"""Random layers for the tests of the CPU kernels, and what torch computes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from rounding import rounding_of_sums
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from triton_sparse_rnn.kernels.cpu.recurrent_layer import RecurrentLayer
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.blocks import count_blocks, expand_block_mask
from triton_sparse_rnn.sparse.layer_config import GATES
from triton_sparse_rnn.sparse.layer_weights import LayerWeights
from triton_sparse_rnn.sparse.patterns import PatternLike, as_pattern
from triton_sparse_rnn.sparse.picks import Picks

MODES = ("RNN_TANH", "RNN_RELU", "GRU", "LSTM", "LSTM projected")  # the last one has proj_size, where H allows it
RAGGED = (5, 5, 4, 2, 2, 1, 1, 1)


def random_matrix(
    gates: int,
    H: int,
    columns: int,
    pattern: PatternLike,
    density: float = 0.4,
    dtype: torch.dtype | None = None,
) -> BlockMatrix:
    """A BlockMatrix [gates * H, columns] of about this density, with outputs of the size of a dense one's.

    In picks it has any zeros at all, so that some places are padded.
    """
    block_size = (1, 1) if isinstance(pattern, Picks) else as_pattern(pattern).block_size
    kept = torch.rand(gates, *count_blocks(H, columns, block_size)) < density
    mask = expand_block_mask(kept, block_size, H, columns).flatten(0, 1)
    weight = torch.randn(gates * H, columns) * mask / max(1.0, columns * density) ** 0.5
    return BlockMatrix.from_dense(weight, pattern, gates=gates, dtype=dtype)


def exact_weights(matrix: BlockMatrix | Tensor) -> Tensor:
    """The stored weights in float64; those of int8 are not rounded to float32 after they met their scale."""
    if isinstance(matrix, Tensor):
        return matrix.double()
    scales = None if matrix.scales is None else matrix.scales.double()
    return dataclasses.replace(matrix, scales=scales).to_dense().double()


class Layer:
    """The weights of a layer, and the calls that are compared."""

    def __init__(
        self,
        mode: str,
        I: int,
        H: int,
        block_ih: PatternLike | None,
        block_hh: PatternLike,
        *,
        D: int = 2,
        density: float = 0.4,
        bias: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        """None for block_ih keeps weight_ih dense."""
        self.mode, _, projected = mode.partition(" ")
        self.I, self.H = I, H
        self.P = H // 2 if projected and H > 1 else H
        gates = GATES[self.mode]
        self.directions = [
            LayerWeights(
                torch.randn(gates * H, I) / I**0.5
                if block_ih is None
                else random_matrix(gates, H, I, block_ih, density, dtype),
                random_matrix(gates, H, self.P, block_hh, density, dtype),
                torch.randn(gates * H) / 2 if bias else None,
                torch.randn(gates * H) / 2 if bias else None,
                random_matrix(1, self.P, H, block_ih or block_hh, density, dtype) if self.P < H else None,
            )
            for _ in range(D)
        ]

    def random_inputs(self, batch_sizes: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Return x and the states; both states of an LSTM."""
        B, D = batch_sizes[0], len(self.directions)
        sizes = [self.P, self.H] if self.mode == "LSTM" else [self.P]
        return torch.randn(sum(batch_sizes), self.I), [torch.randn(D, B, size) for size in sizes]

    def ready(self, *, quantized: bool = False, num_threads: int = 1) -> RecurrentLayer:
        return RecurrentLayer(self.mode, self.directions, quantized=quantized, num_threads=num_threads)

    def by_torch(
        self, x: Tensor, states: list[Tensor], batch_sizes: Sequence[int], dtype: torch.dtype = torch.float64
    ) -> list[Tensor]:
        """y, h_n and, for an LSTM, c_n of nn.RNN, nn.GRU or nn.LSTM."""
        options: dict[str, Any] = {"bias": self.directions[0].bias_ih is not None, "dtype": dtype}
        if self.P != self.H:
            options["proj_size"] = self.P
        if self.mode.startswith("RNN"):
            options["nonlinearity"] = self.mode.removeprefix("RNN_").lower()
        kind: Any = getattr(torch.nn, self.mode.partition("_")[0])
        module = kind(self.I, self.H, bidirectional=len(self.directions) == 2, **options)
        ours = [weight for direction in self.directions for weight in direction if weight is not None]
        with torch.no_grad():
            for parameter, weight in zip(module.parameters(), ours, strict=True):
                parameter.copy_(exact_weights(weight))
            packed = PackedSequence(x.to(dtype), torch.tensor(batch_sizes))
            state = tuple(part.to(dtype) for part in states)
            y, ends = module(packed, state if self.mode == "LSTM" else state[0])
        return [y.data, *(ends if self.mode == "LSTM" else [ends])]


def assert_as_accurate_as_torch(layer: Layer, batch_sizes: Sequence[int], *, rectangular: bool = False) -> None:
    """Run the layer; its largest error is to be no more than a few times that of torch in float32.

    Torch may happen to be exact: added are a few roundings of the functions behind the sums, and those of the sums.
    """
    terms = layer.I + layer.P + 2 + (layer.H if layer.P < layer.H else 0)  # with biases, and a projection
    rounding = 4 * torch.finfo(torch.float32).eps + rounding_of_sums(terms)
    x, states = layer.random_inputs(batch_sizes)
    ours = layer.ready()(x, states, None if rectangular else torch.tensor(batch_sizes))
    exact = layer.by_torch(x, states, batch_sizes)
    theirs = layer.by_torch(x, states, batch_sizes, torch.float32)
    for our, their, right in zip(ours, theirs, exact, strict=True):
        assert our.shape == right.shape
        error, their_error = ((result.double() - right).abs().max() for result in (our, their))
        # NaN, the memory that nothing was written to, is not
        assert error <= 4 * their_error + rounding * right.abs().max().clamp(min=1)
