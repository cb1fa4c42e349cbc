"""Which persistent module a recurrent layer is converted to: one entry for each class that sets `dense_class`.

A layer of a subclass of nn.LSTM, whose own methods a PersistentLSTM lacks, is converted once a subclass of
PersistentLSTM has them too and names it:

    class PersistentStateful(PersistentLSTM):
        dense_class = Stateful  # a subclass of nn.LSTM

        def initial_state(self): ...

The last class that names a `dense_class` takes it over, for all models of the process. `to_dense()` builds that class
with the arguments of nn.LSTM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from triton_sparse_rnn.nn.persistent import PersistentLayer

PERSISTENT_CLASSES: dict[type[nn.RNNBase], type[PersistentLayer]] = {}


def persistent_class(layer: nn.RNNBase) -> type[PersistentLayer]:
    """The entry of the layer's own class, or of the nearest one that this derives from."""
    return next(PERSISTENT_CLASSES[cls] for cls in type(layer).__mro__ if cls in PERSISTENT_CLASSES)


def shown_name(dense_class: type[nn.RNNBase]) -> str:
    """What messages call a class.

    >>> shown_name(nn.GRU), shown_name(type("Stateful", (nn.LSTM,), {}))
    ('nn.GRU', 'Stateful')
    """
    name = dense_class.__name__
    return f"nn.{name}" if getattr(nn, name, None) is dense_class else name
