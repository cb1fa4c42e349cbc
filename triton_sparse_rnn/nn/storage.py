"""How each weight of a recurrent layer is stored when it is converted, and the buffers that hold one of any layer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from triton_sparse_rnn.nn.advice import NOT_PRUNED_ABOVE, is_often_dense, warn_if_dense
from triton_sparse_rnn.nn.computed_weights import check_not_by_hook, read_weight
from triton_sparse_rnn.nn.storage_choice import fastest_storage
from triton_sparse_rnn.ops.layer_weights import LayerWeights
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.blocks import VECTOR_ROWS
from triton_sparse_rnn.sparse.layer_config import LayerConfig
from triton_sparse_rnn.sparse.linear_config import Config
from triton_sparse_rnn.sparse.patterns import Blocks, Pattern


def buffer_names(config: Config) -> set[str]:
    """Return the names of all buffers that may hold weights of such a layer: each as a tensor, or as its parts."""
    weights = config.weight_names()
    return {*weights, *(f"{weight}_{part}" for weight in weights for part in BlockMatrix.PARTS)}


def to_buffers(name: str, weight: BlockMatrix | Tensor) -> dict[str, Tensor]:
    """Return the tensors of a weight under the names of the buffers that hold them."""
    if isinstance(weight, Tensor):
        return {name: weight}
    return {f"{name}_{part}": tensor for part, tensor in weight.parts().items() if tensor is not None}


def from_buffers(config: Config, name: str, buffers: Mapping[str, Tensor | None]) -> BlockMatrix | Tensor:
    """Undo `to_buffers`; a weight has the tensors themselves, not copies, and `check` tells whether parts are missing.

    Raises:
        KeyError: there are no buffers for this weight.
    """
    if name in buffers:
        return buffers[name]  # type: ignore[return-value]
    parts = {part: buffers.get(f"{name}_{part}") for part in BlockMatrix.PARTS}
    if parts["values"] is None:
        raise KeyError(f"{name}_values")
    return BlockMatrix.from_parts(parts, shape=config.weight_shape(name), gates=config.gate_count(name))  # type: ignore[arg-type]


def layer_weights(config: LayerConfig, buffers: Mapping[str, Tensor | None], layer: int) -> list[LayerWeights]:
    """Return the weights of each direction of a layer, as `from_buffers` does."""
    weights = {name: from_buffers(config, name, buffers) for name in config.weight_names(layer)}
    ends = ("", "_reverse")[: config.directions]
    return [LayerWeights(*(weights.get(f"{kind}_l{layer}{end}") for kind in LayerWeights._fields)) for end in ends]  # type: ignore[arg-type]


def store_weights(
    dense: nn.RNNBase,
    dtype: torch.dtype,
    pattern: Pattern | None,
    *,
    backend: str | None = None,
    activation_dtype: torch.dtype | None = None,
) -> dict[str, BlockMatrix | Tensor]:
    """Return copies of all weights by name: matrices in blocks or picks, biases as they are.

    A weight_ih stays an ordinary matrix where that is faster and no `pattern` is named, or one of fewer than 16 rows of
    which more than NOT_PRUNED_ABOVE would be stored; but not where `dtype` is another than its own.

    Args:
        dense: an nn.RNN, nn.GRU or nn.LSTM.
        dtype: in which matrices are stored.
        pattern: in which they are, None for `fastest_storage`.
        backend, activation_dtype: with which the layer is to run.
    Raises:
        ValueError: a hook computes a weight, or it cannot be stored in dtype.
    """
    config = LayerConfig.of(dense)
    weights: dict[str, BlockMatrix | Tensor] = {}
    for name in config.weight_names():
        check_not_by_hook(dense, name)
        weight = read_weight(dense, name)
        if weight.is_meta:
            raise ValueError(f"{name} is on the meta device and holds no weights to convert")
        if name.startswith("bias"):
            weights[name] = weight.clone(memory_format=torch.contiguous_format)
            continue
        gates = config.gate_count(name)
        by_gate = weight.unflatten(0, (gates, -1))
        if pattern is not None:
            pattern.check_size(
                by_gate.shape[1], by_gate.shape[2], f"each gate of {name}" if gates > 1 else name, "storage"
            )
        of_inputs = name.startswith("weight_ih")
        may_stay_dense = dtype == weight.dtype and of_inputs
        own = pattern or fastest_storage(
            by_gate,
            of_inputs=of_inputs,
            backend=backend,
            activation_dtype=activation_dtype,
            may_stay_dense=may_stay_dense,
        )
        shown = own or Blocks(16, 1)
        density = shown.kept(by_gate).double().mean().item()
        if (
            pattern is not None
            and may_stay_dense
            and pattern.block_size[0] < VECTOR_ROWS
            and density > NOT_PRUNED_ABOVE
        ):
            own = None
        if not is_often_dense(name, weight, config.hidden_size):
            kept_dense = own is None
            warn_if_dense(
                name, weight, shown, density, gates=gates, kept_dense=kept_dense, named=pattern, backend=backend
            )
        weights[name] = (
            weight.clone(memory_format=torch.contiguous_format)
            if own is None
            else BlockMatrix.from_dense(weight, own, gates=gates, dtype=dtype)
        )
    return weights


def stored_density(weights: Mapping[str, BlockMatrix | Tensor]) -> float:
    """Return the weights in stored blocks and in dense matrices as a fraction of those of all matrices."""
    matrices = [weight for name, weight in weights.items() if name.startswith("weight")]
    stored = sum(math.prod(m.shape) * (m.density if isinstance(m, BlockMatrix) else 1) for m in matrices)
    return stored / sum(math.prod(m.shape) for m in matrices)


def describe_storage(weights: Mapping[str, BlockMatrix | Tensor]) -> list[str]:
    """Return how weights are stored, as the repr of a module shows it."""
    blocks = [weight for weight in weights.values() if isinstance(weight, BlockMatrix)]
    patterns = list(dict.fromkeys(matrix.pattern for matrix in blocks))
    dense = [name for name, weight in weights.items() if name.startswith("weight") and isinstance(weight, Tensor)]
    return [
        f"density={stored_density(weights):.3f}",
        f"storage={patterns[0] if len(patterns) == 1 else patterns}",
        *([f"dense={dense}"] if dense else []),
        f"weight_dtype={blocks[0].values.dtype}",
        f"nbytes={sum(weight.nbytes for weight in weights.values())}",
    ]
