"""The tensors of a model by name, each weight as one, however it is kept."""

from __future__ import annotations

from torch import Tensor, nn

from triton_sparse_rnn.nn.computed_weights import with_computed_weights
from triton_sparse_rnn.nn.persistent import PersistentLayer
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix


def tensors_by_name(model: nn.Module) -> dict[str, Tensor | BlockMatrix]:
    """Return the state_dict of a model, blocks of converted layers put together, and weights that are computed."""
    tensors: dict[str, Tensor | BlockMatrix] = {}
    converted = {
        name: module.stored_weights()
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, PersistentLayer)
    }
    for name, value in with_computed_weights(model, model.state_dict()).items():
        owner = name.rpartition(".")[0]
        if owner in converted:
            tensors |= {f"{owner}.{weight}".lstrip("."): stored for weight, stored in converted[owner].items()}
        elif isinstance(value, Tensor):
            tensors[name] = value
    return tensors
