"""A model with recurrent layers in every place where modules can be."""

from typing import Any

import torch
from torch import nn


class Places(nn.Module):
    """A layer in every place where modules can be: attribute, list, dict, sequential, shared, plain list."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(2, 3)
        self.absent = None
        self.stack = nn.ModuleList([nn.GRU(2, 3), nn.Linear(3, 2)])
        self.named = nn.ModuleDict({"lstm": nn.LSTM(2, 3), "again": self.stack[0]})
        self.chain = nn.Sequential(nn.Sequential(nn.GRU(2, 3)))
        self.same_chain = self.chain
        self.cell = nn.GRUCell(2, 3)
        self.by_hand = [self.rnn]
        self.scale = torch.ones(1)
        self.register_buffer("offset", torch.zeros(1))


def make_model() -> Any:  # not Places: for a type checker its submodules may be tensors
    return Places()
