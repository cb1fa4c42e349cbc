"""Which weights a recurrent layer has, and how each is stored when it is converted."""

from __future__ import annotations

import warnings
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from triton_sparse_rnn.ops.layer_weights import GATES
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.blocks import to_blocks

BLOCK_SIZES = ((16, 1), (16, 4), (16, 16), (16, 32))
DENSE_ABOVE = 0.5  # the fraction of stored blocks above which a user is told that there is little to skip


class LayerSizes(Protocol):
    """The attributes of nn.RNNBase that tell which weights there are."""

    num_layers: int
    bidirectional: bool
    bias: bool
    proj_size: int


def weight_names(sizes: LayerSizes, layer: int | None = None) -> list[str]:
    """Return the names of all weights, or of one layer's, in the order of nn.RNNBase.

    >>> weight_names(torch.nn.GRU(4, 8, bias=False, bidirectional=True))
    ['weight_ih_l0', 'weight_hh_l0', 'weight_ih_l0_reverse', 'weight_hh_l0_reverse']
    """
    kinds = ["weight_ih", "weight_hh"]
    kinds += ["bias_ih", "bias_hh"] if sizes.bias else []
    kinds += ["weight_hr"] if sizes.proj_size else []
    layers = range(sizes.num_layers) if layer is None else (layer,)
    ends = ("", "_reverse") if sizes.bidirectional else ("",)
    return [f"{kind}_l{k}{end}" for k in layers for end in ends for kind in kinds]


def store_weights(
    dense: nn.RNNBase, dtype: torch.dtype, block_size: tuple[int, int] | None
) -> dict[str, BlockMatrix | Tensor]:
    """Return copies of all weights by name: weight_ih and weight_hh in blocks, all others as they are.

    Args:
        dense: an nn.RNN, nn.GRU or nn.LSTM.
        dtype: in which blocks are stored.
        block_size: (BR, BC), None for `choose_block_size`.
    Raises:
        ValueError: a weight is no parameter, or cannot be stored in dtype.
    """
    weights: dict[str, BlockMatrix | Tensor] = {}
    for name in weight_names(dense):
        if name not in dense._parameters and not is_parametrized(dense, name):
            raise ValueError(
                f"{name} is computed by a hook, as torch.nn.utils.prune and weight_norm do, and would not be up to "
                "date; make it a parameter first, with prune.remove(layer, name) or remove_weight_norm(layer, name)"
            )
        weight = getattr(dense, name).detach()
        if weight.is_meta:
            raise ValueError(f"{name} is on the meta device and holds no weights to convert")
        if name.startswith(("weight_ih", "weight_hh")):
            gates = GATES[dense.mode]
            size = choose_block_size(weight, gates, dtype) if block_size is None else block_size
            weights[name] = stored = BlockMatrix.from_dense(weight, size, gates=gates, dtype=dtype)
            warn_if_dense(name, weight, stored)
        else:
            weights[name] = weight.clone(memory_format=torch.contiguous_format)
    return weights


def choose_block_size(weight: Tensor, gates: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the one of BLOCK_SIZES that stores the weight [G * H, columns] in the fewest bytes."""
    nonzero = weight.ne(0).unflatten(0, (gates, -1))

    def stored_bytes(block_size: tuple[int, int]) -> int:
        stored = int(to_blocks(nonzero, block_size).flatten(-2).any(-1).sum())
        return stored * (block_size[0] * block_size[1] * dtype.itemsize + torch.int32.itemsize)

    return min(BLOCK_SIZES, key=stored_bytes)


def warn_if_dense(name: str, weight: Tensor, stored: BlockMatrix) -> None:
    """Say so when most of a weight has to be stored, and what would help."""
    if stored.density <= DENSE_ABOVE:
        return
    zeros = weight.eq(0).float().mean().item()
    rows, columns = stored.block_size
    advice = (
        f"prune it first, in blocks of ({rows}, {columns})"
        if zeros <= 1 - DENSE_ABOVE
        else (f"its zeros do not fill blocks: prune with block_size=({rows}, {columns})")
    )
    warnings.warn(
        f"{name} is {zeros:.0%} zeros and {stored.density:.0%} of its {rows}x{columns} blocks are stored, so there is "
        f"little to skip and it runs as a dense product; {advice}. (The CPU kernel for GRU breaks even with nn.GRU at "
        "0 % zeros: measured at batch 1 to 32 with H 512 and at batch 1 with H 256 to 1024, on AMD Zen 4.)",
        stacklevel=4,
    )


def warn_if_slow(reason: str | None) -> None:
    """Say so when a layer gets no kernel of its own."""
    warnings.warn(
        f"the layer will run on backend 'reference', plain torch, and slower than torch.nn: backend 'cpu' cannot "
        f"run it because {reason}. backend='reference' asks for this and says nothing",
        stacklevel=3,
    )
