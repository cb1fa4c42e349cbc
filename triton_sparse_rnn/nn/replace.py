"""Find the recurrent layers of a model, and what their classes add to torch's."""

from __future__ import annotations

from torch import nn
from torch.nn import GRU, LSTM, RNN, RNNBase

_NOT_BEHAVIOUR = {
    "__init__",  # is over once a layer exists
    # what a class statement writes by itself:
    "__annotate__",
    "__annotate_func__",
    "__annotations__",
    "__annotations_cache__",
    "__dict__",
    "__doc__",
    "__firstlineno__",
    "__module__",
    "__orig_bases__",
    "__parameters__",
    "__static_attributes__",
    "__weakref__",
}


def named_recurrent_layers(model: nn.Module) -> dict[str, RNNBase]:
    """Return every nn.RNN, nn.GRU and nn.LSTM of `model`, instances of subclasses too, by name.

    A layer that is shared appears once, under the first of its names; `model` itself has the name "". As with
    `model.named_modules()`, a module kept in a plain list is not found.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, (RNN, GRU, LSTM))}


def added_members(layer: nn.Module, base: type[nn.Module]) -> list[str]:
    """Return the names of methods and class attributes that the class of `layer` overrides in `base` or adds to it.

    They are what is lost when a module of another class takes the place of `layer`. For what the instance holds see
    instance_state.py.

    >>> import torch
    >>> class Stateful(nn.GRU):
    ...     def __init__(self, size):
    ...         super().__init__(size, size)
    ...     def initial_state(self):
    ...         return torch.zeros(self.num_layers, 1, self.hidden_size)
    >>> added_members(Stateful(4), nn.GRU)
    ['initial_state']
    """
    added = [cls for cls in type(layer).__mro__ if cls not in base.__mro__]
    return sorted({name for cls in added for name in vars(cls)} - _NOT_BEHAVIOUR)
