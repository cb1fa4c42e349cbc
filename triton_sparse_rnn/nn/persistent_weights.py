"""The weights of a persistent module: its sizes, and the buffers that hold each weight once, in blocks.

A weight such as weight_hh_l0 is held as the tensors of a BlockMatrix in buffers weight_hh_l0_values, _columns, _starts
and, for int8, _scales; biases, and each weight_ih that was kept dense, are buffers under their own names. So is the
weight of a linear layer, as weight_values and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from triton_sparse_rnn.nn.plan import count_writes
from triton_sparse_rnn.nn.storage import buffer_names, from_buffers, stored_density, to_buffers
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.linear_config import Config

if TYPE_CHECKING:
    from typing_extensions import Self

_BESIDE_VALUES = tuple(f"_{part}" for part in BlockMatrix.PARTS if part != "values")  # buffers that are never cast


class PersistentWeights(nn.Module):
    """What holds the weights, moves, casts and loads them."""

    _matrix: ClassVar[str]  # a weight that there always is, in blocks: its device is that of all

    def __init__(self, config: Config, weights: Mapping[str, BlockMatrix | Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self._config: Any = config
        self._plan: Any = None  # how it runs eagerly, made at the first call
        for name in config.weight_names():
            weight = weights[name]
            if not name.startswith(("weight_ih", "bias")) and not isinstance(weight, BlockMatrix):
                raise TypeError(f"{name} must be a BlockMatrix, got {type(weight).__name__}")
            for buffer, tensor in to_buffers(name, weight).items():
                self.register_buffer(buffer, tensor)
        count_writes(self._buffers, self._buffers.keys())
        # Follows .to() like any buffer, and so tells the dtype and device of inputs even without biases.
        self.register_buffer("_marker", torch.empty(0, dtype=dtype, device=self.device), persistent=False)

    def stored_weights(self) -> dict[str, BlockMatrix | Tensor]:
        """Return all weights under their names in the dense class.

        Matrices are BlockMatrix, unless it is a weight_ih that was kept dense; the others are tensors. The tensors in
        them are the buffers of this module, not copies.
        """
        config = self._config
        return {name: from_buffers(config, name, self._buffers) for name in config.weight_names()}

    @property
    def dtype(self) -> torch.dtype:
        """Of inputs, outputs and biases; stored weights may be narrower."""
        return self._buffers["_marker"].dtype  # type: ignore[union-attr] - quicker than self._marker

    @property
    def device(self) -> torch.device:
        """Of all buffers, and so of inputs."""
        return self._buffers[f"{self._matrix}_values"].device  # type: ignore[union-attr]

    @property
    def density(self) -> float:
        """Stored weights of all matrices, zeros that fill up what is stored too, as a fraction of all."""
        return stored_density(self.stored_weights())

    @property
    def nbytes(self) -> int:
        """Bytes of all stored weights and indices."""
        return sum(weight.nbytes for weight in self.stored_weights().values())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move and cast as any module does, but leave blocks that are stored in a dtype of their own in it."""
        dtype, names = self.dtype, buffer_names(self._config)
        own = {
            name: tensor
            for name, tensor in self._buffers.items()
            if name in names and tensor is not None and (tensor.dtype != dtype or name.endswith(_BESIDE_VALUES))
        }
        super()._apply(fn, recurse)
        for name, tensor in own.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        self._plan = None  # share_memory() moves what the same tensors hold
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Load, and look at the weights anew: indices may have been written into the tensors that were checked."""
        before = dict(self._buffers)
        super()._load_from_state_dict(*args, **kwargs)
        self._follow_assigned(before)
        self._plan = None

    def _follow_assigned(self, before: Mapping[str, Tensor | None]) -> None:
        """Take the dtype and device of tensors that load_state_dict(assign=True) has put in the place of others.

        Biases and dense weights tell the dtype, or, where there are none, blocks that had that of this module. If they
        disagree, nothing changes, and the next call says which one does not fit.

        Args:
            before: the buffers until then.
        """
        plain: set[torch.dtype] = set()
        blocks: set[torch.dtype] = set()
        own = (name for weight in self.stored_weights().items() for name in to_buffers(*weight))
        for name in own:  # and not what a user has added
            old, new = before[name], self._buffers[name]
            if old is None or new is None or new is old or old.dtype != self.dtype or name.endswith(_BESIDE_VALUES):
                continue
            (blocks if name.endswith(BlockMatrix.PARTS) else plain).add(new.dtype)
        told = plain or blocks
        dtype = told.pop() if len(told) == 1 else self.dtype
        self._buffers["_marker"] = torch.empty(0, dtype=dtype, device=self.device)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made again at the next call."""
        return self.__dict__ | {"_plan": None}
