"""Small models to be taught, for the tests beside this file."""

import copy

import torch
from torch import nn

TINY = 1e-9  # a squared relative difference: with and without gradients torch rounds differently
X = torch.linspace(-2, 2, 3 * 4 * 5).sin().view(3, 4, 5)


class Net(nn.Module):
    """Two recurrent layers and a head."""

    def __init__(self, hidden=16, outer=7, dropout=0.0):
        super().__init__()
        self.inner = nn.GRU(5, hidden, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.LSTM(hidden, outer, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * outer, 3)

    def forward(self, x):
        return self.head(self.outer(self.dropout(self.inner(x)[0]))[0])


class Speller(nn.Module):
    """Carries its state along, and says what it was called with."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(5, 7, batch_first=True)
        self.heard = []

    def forward(self, x, state=None, *, scale=1.0):
        self.heard.append((state, scale))
        return self.rnn(scale * x, state)


def changed(model):
    """A copy with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return other


def expected(ours, theirs):
    """The distance between two output sequences, by its definition."""
    return ((ours - theirs).square().mean() / theirs.square().mean()).item()
