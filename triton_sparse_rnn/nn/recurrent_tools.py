"""What code written for nn.GRU asks of a persistent recurrent module: its sizes, and weights, which it has not."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, ClassVar

from torch import Tensor

from triton_sparse_rnn.nn.persistent_module import PersistentModule
from triton_sparse_rnn.nn.storage import from_buffers
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.layer_config import LayerConfig

_DENSE_WEIGHT = re.compile(r"weight_(ih|hh|hr)_l\d+(_reverse)?")
_LISTS_OF_WEIGHTS = {"_flat_weights", "_flat_weights_names", "_all_weights", "all_weights"}


def _held(name: str) -> Any:
    """An attribute of nn.RNNBase that `_config` holds; who assigns to it gives the module another config."""

    def read(module: RecurrentTools) -> Any:
        return getattr(module._config, name)

    def write(module: RecurrentTools, value: Any) -> None:
        module._config = dataclasses.replace(module._config, **{name: value})

    return property(read, write)


class RecurrentTools(PersistentModule):
    """The part of a PersistentLayer that is there for others."""

    _matrix: ClassVar[str] = "weight_hh_l0"
    _config: LayerConfig

    mode: str = _held("mode")
    input_size: int = _held("input_size")
    hidden_size: int = _held("hidden_size")
    proj_size: int = _held("proj_size")
    num_layers: int = _held("num_layers")
    bias: bool = _held("bias")
    batch_first: bool = _held("batch_first")
    dropout: float = _held("dropout")
    bidirectional: bool = _held("bidirectional")

    def stored_weights(self, layer: int | None = None) -> dict[str, BlockMatrix | Tensor]:
        """Return all weights, or one layer's, under their names in the dense class.

        weight_hh and weight_hr are BlockMatrix, and so is weight_ih unless it was kept dense; the others are tensors.
        The tensors in them are the buffers of this module, not copies.
        """
        config = self._config
        return {name: from_buffers(config, name, self._buffers) for name in config.weight_names(layer)}

    def __getattr__(self, name: str) -> Any:
        """Say what there is instead of nn.GRU's weights: a dense copy would silently lose what is written to it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if _DENSE_WEIGHT.fullmatch(name) is None and name not in _LISTS_OF_WEIGHTS:
                raise
        one = name if name.startswith("weight") else "weight_hh_l0"
        raise AttributeError(
            f"a {type(self).__name__} has no {name}: it was converted by to_sparse(), which stores no zeros. "
            f"stored_weights()[{one!r}].to_dense() is a copy of one, to_dense() a layer of torch.nn with all of them, "
            "and .dtype and .device are those of its inputs and states"
        )

    def flatten_parameters(self) -> None:
        """Do nothing: there is nothing to flatten. Here because code written for nn.RNN calls it."""
