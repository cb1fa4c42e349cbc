"""The character model of the demo: embedding, recurrent layer, decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class CharacterModel(nn.Module):
    """Scores for the next symbol from the symbols so far.

    Args:
        symbols: V, the size of the vocabulary.
        rnn: the recurrent layer, called as nn.GRU is, of [T, B, I] and with its attributes.
    """

    def __init__(self, symbols: int, rnn: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, rnn.input_size)
        self.rnn = rnn
        self.decoder = nn.Linear(rnn.hidden_size, symbols)

    def forward(self, ids: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Take ids [T, B] and a state [1, B, H], return scores [T, B, V] and the next state."""
        y, end = self.rnn(self.embedding(ids), h)
        return self.decoder(y), end


def build_model(
    layer_class: type[nn.GRU], symbols: int, input_size: int, hidden_size: int, seed: int
) -> CharacterModel:
    """Return a model with a layer of nn.GRU or SparseGRU; both start from the same weights."""
    torch.manual_seed(seed)
    return CharacterModel(symbols, layer_class(input_size, hidden_size))
