"""The tensors of a model by name, each weight as one, however it is kept."""

from __future__ import annotations

from torch import Tensor, nn

from triton_sparse_rnn.names import clean_name, clean_names
from triton_sparse_rnn.nn.computed_weights import with_computed_weights
from triton_sparse_rnn.nn.instance_state import own_tensors
from triton_sparse_rnn.nn.persistent_module import PersistentModule
from triton_sparse_rnn.nn.state_names import layers_by_prefix
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix


def tensors_by_name(model: nn.Module) -> dict[str, Tensor | BlockMatrix]:
    """Return the state_dict of a model, blocks of converted layers put together, and weights that are computed.

    Names are without what wrappers put in, unless two of them would become one.
    """
    state = model.state_dict(keep_vars=True)
    persistent = [module for module in model.modules() if isinstance(module, PersistentModule)]
    owners: dict[str, tuple[str, PersistentModule]] = {}
    for prefix, layer in layers_by_prefix(model, state, persistent)[0].items():
        owners |= {prefix + name: (prefix, layer) for name in own_tensors(layer)}
    found: dict[str, Tensor | BlockMatrix] = {}
    for key, value in state.items():
        if key in owners:
            prefix, layer = owners[key]
            found |= {prefix + weight: stored for weight, stored in layer.stored_weights().items()}
        elif isinstance(value, Tensor):
            found[key] = value
    names = clean_names(found)
    is_clean = all(name == clean_name(key) for key, name in names.items())
    name_of = clean_name if is_clean else str
    return with_computed_weights(model, {names[key]: value for key, value in found.items()}, name_of)
