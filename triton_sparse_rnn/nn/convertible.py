"""Which layers can be converted without losing what their class or their instance adds."""

from __future__ import annotations

from torch import nn

from triton_sparse_rnn.nn.computed_weights import lost_members
from triton_sparse_rnn.nn.instance_state import what_is_lost
from triton_sparse_rnn.nn.persistent_module import persistent_class
from triton_sparse_rnn.nn.training import TRAINING_CLASSES

_DERIVE = "derive a class from PersistentGRU and the like that has them too, with its class as dense_class"


def why_not_converted(layer: nn.Module) -> tuple[str, str]:
    """Return what a layer would lose if it were converted, and the way out; empty texts if nothing.

    >>> layer = nn.GRU(2, 3)
    >>> why_not_converted(layer)
    ('', '')
    >>> layer.forward = lambda input, hx=None: nn.GRU.forward(layer, 2 * input, hx)
    >>> why_not_converted(layer)[0]
    'a GRU, which has its own forward set on the layer itself and would lose it'
    """
    new_class = persistent_class(layer)
    dense_class = new_class.dense_class
    training_class = TRAINING_CLASSES.get(dense_class, dense_class)
    base = training_class if isinstance(layer, training_class) else dense_class
    if lost := lost_members(layer, base):
        return f"a {type(layer).__name__}, which would lose {', '.join(lost)}", _DERIVE
    return what_is_lost(layer, new_class)
