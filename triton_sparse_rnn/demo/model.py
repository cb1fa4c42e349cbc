"""The character model of the demo: embedding, recurrent layer, decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from triton_sparse_rnn.nn.training import SparseGRU


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


def build_model(kind: str, symbols: int, input_size: int, hidden_size: int, seed: int) -> CharacterModel:
    """Return the "sparse" model (SparseGRU) or the "dense" one (nn.GRU); both start from the same weights."""
    torch.manual_seed(seed)
    rnn = {"sparse": SparseGRU, "dense": nn.GRU}[kind](input_size, hidden_size)
    return CharacterModel(symbols, rnn)
