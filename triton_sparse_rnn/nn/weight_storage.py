"""Which weights a recurrent layer has, how each is stored when it is converted, and the buffers that hold it then."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from triton_sparse_rnn.nn.computed_weights import computed_weight, read_weight
from triton_sparse_rnn.notices import in_layer, warn
from triton_sparse_rnn.sparse.block_matrix import GATES, BlockMatrix
from triton_sparse_rnn.sparse.blocks import VECTOR_ROWS, to_blocks

BLOCK_SIZES = ((16, 1), (16, 4), (16, 16), (16, 32))
MATRIX_PARTS = ("values", "columns", "starts", "scales")
NOT_PRUNED_ABOVE = 0.95  # the fraction of stored blocks above which an input weight stays an ordinary matrix
FEW_COLUMNS = 1 / 16  # of H: a weight_ih so narrow may well be left dense, and nothing is said of it
LITTLE_TO_SKIP_ABOVE = 0.5  # the fraction of stored blocks above which a user is told so
# The fraction of zeros from which a GRU layer on the CPU is faster than another engine: {engine: {H: fraction}}.
# Measured by bench/cpu/bench_break_even.py; 0 is the lowest that was.
BREAK_EVEN_ZEROS = {
    "nn.GRU": {256: 0.0, 512: 0.0, 1024: 0.0, 2048: 0.0},
    "onnxruntime, the best of the others in float32,": {256: 0.0, 512: 0.03, 1024: 0.26, 2048: 0.04},
}
BREAK_EVEN_MACHINE = "one thread, batch 1, AMD Zen 4"


class LayerSizes(Protocol):
    """The attributes of nn.RNNBase that tell which weights there are."""

    mode: str
    input_size: int
    hidden_size: int
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


def weight_shape(sizes: LayerSizes, name: str) -> tuple[int, ...]:
    """Return the shape of one of `weight_names(sizes)`.

    >>> weight_shape(torch.nn.LSTM(4, 8, proj_size=3, bidirectional=True, num_layers=2), "weight_ih_l1_reverse")
    (32, 6)
    """
    H, I = int(sizes.hidden_size), int(sizes.input_size)  # torch.nn takes integers of numpy, and keeps them
    rows, hidden = GATES[sizes.mode] * H, int(sizes.proj_size) or H
    if name.startswith("bias"):
        return (rows,)
    if name.startswith("weight_hr"):
        return hidden, H
    if name.startswith("weight_hh"):
        return rows, hidden
    first_layer = name.removesuffix("_reverse") == "weight_ih_l0"
    return rows, I if first_layer else hidden * (2 if sizes.bidirectional else 1)


def gate_count(sizes: LayerSizes, name: str) -> int:
    """Return how many matrices a weight stacks: G, and 1 for weight_hr."""
    return 1 if name.startswith("weight_hr") else GATES[sizes.mode]


def to_buffers(name: str, weight: BlockMatrix | Tensor) -> dict[str, Tensor]:
    """Return the tensors of a weight under the names of the buffers that hold them."""
    if isinstance(weight, Tensor):
        return {name: weight}
    parts = {f"{name}_{part}": getattr(weight, part) for part in MATRIX_PARTS}
    return {buffer: tensor for buffer, tensor in parts.items() if tensor is not None}


def from_buffers(sizes: LayerSizes, name: str, buffers: Mapping[str, Tensor | None]) -> BlockMatrix | Tensor:
    """Undo `to_buffers`; a weight has the tensors themselves, not copies.

    Raises:
        KeyError: there are no buffers for this weight.
    """
    if name in buffers:
        return buffers[name]  # type: ignore[return-value]
    values, columns, starts = (buffers[f"{name}_{part}"] for part in MATRIX_PARTS[:3])
    scales = buffers.get(f"{name}_scales")
    shape, gates = weight_shape(sizes, name), gate_count(sizes, name)
    return BlockMatrix(values, columns, starts, shape, gates, scales)  # type: ignore[arg-type]


def store_weights(
    dense: nn.RNNBase, dtype: torch.dtype, block_size: tuple[int, int] | None
) -> dict[str, BlockMatrix | Tensor]:
    """Return copies of all weights by name: matrices in blocks, biases as they are.

    A weight_ih of which more than NOT_PRUNED_ABOVE would be stored stays an ordinary matrix, unless `dtype` is another
    than its own or `block_size` asks for blocks of 16 rows or more.

    Args:
        dense: an nn.RNN, nn.GRU or nn.LSTM.
        dtype: in which blocks are stored.
        block_size: (BR, BC), None for `choose_block_size`.
    Raises:
        ValueError: a hook computes a weight, or it cannot be stored in dtype.
    """
    weights: dict[str, BlockMatrix | Tensor] = {}
    for name in weight_names(dense):
        _refuse_computed_by_hook(dense, name)
        weight = read_weight(dense, name)
        if weight.is_meta:
            raise ValueError(f"{name} is on the meta device and holds no weights to convert")
        if name.startswith("bias"):
            weights[name] = weight.clone(memory_format=torch.contiguous_format)
            continue
        gates = gate_count(dense, name)
        size = choose_block_size(weight, gates, dtype) if block_size is None else block_size
        density = kept_blocks(weight, gates, size).double().mean().item()
        as_it_is = dtype == weight.dtype and (block_size is None or block_size[0] < VECTOR_ROWS)
        kept_dense = as_it_is and name.startswith("weight_ih") and density > NOT_PRUNED_ABOVE
        few_columns = name.startswith("weight_ih") and weight.shape[1] <= dense.hidden_size * FEW_COLUMNS
        on_request = name.startswith("weight_hr")  # a Pruner leaves it dense unless `include` names it
        if not (few_columns or on_request):
            warn_if_dense(name, weight, size, density, kept_dense=kept_dense)
        weights[name] = (
            weight.clone(memory_format=torch.contiguous_format)
            if kept_dense
            else BlockMatrix.from_dense(weight, size, gates=gates, dtype=dtype)
        )
    return weights


def _refuse_computed_by_hook(dense: nn.RNNBase, name: str) -> None:
    """Raise for a weight that is computed before each call; a parametrization computes at every access instead."""
    computed = computed_weight(dense, name)
    if name in dense._parameters or (computed is not None and computed.hook is None):
        return
    layer = f"model.get_submodule({path!r})" if (path := in_layer("")) else "layer"
    if computed is None:
        raise ValueError(
            f"{in_layer(name)} is no parameter, but computed by something unknown: make it one first, by "
            f"{layer}.register_parameter({name!r}, ...)"
        )
    raise ValueError(
        f"{in_layer(name)} is computed by a hook before each call, from {' and '.join(computed.parts)}: make it a "
        f"parameter again by {computed.removal}({layer}, {name!r}), of a copy if training goes on"
    )


def kept_blocks(weight: Tensor, gates: int, block_size: tuple[int, int]) -> Tensor:
    """Return which blocks of a weight [G * H, columns] hold anything but zeros: [G, block rows, block columns]."""
    return to_blocks(weight.ne(0).unflatten(0, (gates, -1)), block_size).flatten(-2).any(-1)


def choose_block_size(weight: Tensor, gates: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the one of BLOCK_SIZES that stores the weight [G * H, columns] in the fewest bytes."""

    def stored_bytes(block_size: tuple[int, int]) -> int:
        stored = int(kept_blocks(weight, gates, block_size).sum())
        return stored * (block_size[0] * block_size[1] * dtype.itemsize + torch.int32.itemsize)

    return min(BLOCK_SIZES, key=stored_bytes)


def stored_density(weights: Mapping[str, BlockMatrix | Tensor]) -> float:
    """Return the weights in stored blocks and in dense matrices as a fraction of those of all matrices."""
    matrices = [weight for name, weight in weights.items() if name.startswith("weight")]
    stored = sum(math.prod(m.shape) * (m.density if isinstance(m, BlockMatrix) else 1) for m in matrices)
    return stored / sum(math.prod(m.shape) for m in matrices)


def describe_storage(weights: Mapping[str, BlockMatrix | Tensor]) -> list[str]:
    """Return how weights are stored, as the repr of a module shows it."""
    blocks = [weight for weight in weights.values() if isinstance(weight, BlockMatrix)]
    sizes = sorted({matrix.block_size for matrix in blocks})
    dense = [name for name, weight in weights.items() if name.startswith("weight") and isinstance(weight, Tensor)]
    return [
        f"density={stored_density(weights):.3f}",
        f"block_size={sizes[0] if len(sizes) == 1 else sizes}",
        *([f"dense={dense}"] if dense else []),
        f"weight_dtype={blocks[0].values.dtype}",
        f"nbytes={sum(weight.nbytes for weight in weights.values())}",
    ]


def warn_if_dense(
    name: str, weight: Tensor, block_size: tuple[int, int], density: float, *, kept_dense: bool = False
) -> None:
    """Say so when there is little to skip in a weight, and what would help.

    Args:
        name: of the weight.
        weight: [G * H, columns].
        block_size: (BR, BC).
        density: the fraction of its blocks that hold anything but zeros.
        kept_dense: whether it stays an ordinary matrix.
    """
    if density <= LITTLE_TO_SKIP_ABOVE:
        return
    zeros = weight.eq(0).float().mean().item()
    rows, columns = block_size
    consequence = "runs as a dense product" if density > NOT_PRUNED_ABOVE else "gains little"
    consequence = "stays dense and runs as a dense matrix product" if kept_dense else consequence
    advice = (
        f"prune it first, in blocks of ({rows}, {columns})"
        if zeros <= 1 - LITTLE_TO_SKIP_ABOVE
        else f"its zeros do not fill blocks: prune with pattern=({rows}, {columns})"
    )
    measured = "" if weight.is_cuda else f" ({break_even_text()})"
    warn(
        f"{in_layer(name)} is {zeros:.0%} zeros and {density:.0%} of its {rows}x{columns} blocks hold other weights, "
        f"so there is little to skip and it {consequence}; {advice}.{measured}"
    )


def break_even_text() -> str:
    """Return BREAK_EVEN_ZEROS as a sentence."""
    engines = (
        f"with {engine} at " + ", ".join(f"{zeros:.0%} zeros for H {H}" for H, zeros in by_size.items())
        for engine, by_size in BREAK_EVEN_ZEROS.items()
    )
    return f"A GRU layer on the CPU breaks even {'; '.join(engines)}: {BREAK_EVEN_MACHINE}."


def warn_if_slow(backend: str, reason: str | None) -> None:
    """Say so when a layer gets no kernel of its own.

    Args:
        backend: the fast one of the device.
        reason: why it cannot run the layer.
    """
    layer = f"layer {path!r}" if (path := in_layer("")) else "the layer"
    warn(
        f"{layer} will run on backend 'reference', plain torch, and slower than torch.nn: backend {backend!r} cannot "
        f"run it because {reason}. backend='reference' asks for this and says nothing"
    )
