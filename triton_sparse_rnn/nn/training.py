"""The training modules: PyTorch's own recurrent layers under another name.

While weights are pruned they are ordinary zeros in ordinary parameters, so a training module has nothing to compute
differently. It is a true subclass that inherits every behaviour, and adds the way in (`from_dense`) and the way out
(`to_sparse`). An LSTM or GRU with a `gate_gradient` goes its own way in training: see gate_gradients/layer.py.
"""

from __future__ import annotations

from torch.nn import GRU, LSTM, RNN, RNNBase  # bound here, so that a patched torch.nn.GRU may be a SparseGRU

from triton_sparse_rnn.gate_gradients.layer import GateGradientLayer
from triton_sparse_rnn.nn.persistent import PersistentGRU, PersistentLSTM, PersistentRNN
from triton_sparse_rnn.nn.training_layer import TrainingLayer


class SparseRNN(TrainingLayer[PersistentRNN], RNN):
    """For training, dense in memory: an nn.RNN whose weights a `Pruner` masks.

    Arguments, call and state_dict are those of nn.RNN.

    >>> import torch
    >>> layer = SparseRNN(4, 8, nonlinearity="relu")
    >>> y, h = layer(torch.zeros(5, 2, 4))  # x [T, B, I] -> y [T, B, H], h [L, B, H]
    >>> layer
    SparseRNN(4, 8)
    """

    dense_class = RNN


class SparseGRU(GateGradientLayer, TrainingLayer[PersistentGRU], GRU):
    """For training, dense in memory: an nn.GRU whose weights a `Pruner` masks.

    Arguments, call and state_dict are those of nn.GRU. One argument is added, by name only: `gate_gradient`, a
    `GateGradientSparsity` by which small gate gradients become zero in training. It can be set later, too.

    >>> import torch
    >>> layer = SparseGRU(4, 8, num_layers=2)  # was nn.GRU(4, 8, num_layers=2)
    >>> y, h = layer(torch.zeros(5, 2, 4))  # x [T, B, I] -> y [T, B, H], h [L, B, H]
    >>> isinstance(layer, torch.nn.GRU), layer
    (True, SparseGRU(4, 8, num_layers=2))
    """

    dense_class = GRU


class SparseLSTM(GateGradientLayer, TrainingLayer[PersistentLSTM], LSTM):
    """For training, dense in memory: an nn.LSTM whose weights a `Pruner` masks.

    Arguments, call and state_dict are those of nn.LSTM. One argument is added, by name only: `gate_gradient`, a
    `GateGradientSparsity` by which small gate gradients become zero in training. It can be set later, too.

    >>> import torch
    >>> layer = SparseLSTM(4, 8, batch_first=True)
    >>> y, (h, c) = layer(torch.zeros(2, 5, 4))  # x [B, T, I] -> y [B, T, H], h and c [L, B, H]
    >>> layer
    SparseLSTM(4, 8, batch_first=True)
    """

    dense_class = LSTM


TRAINING_CLASSES: dict[type[RNNBase], type[RNNBase]] = {RNN: SparseRNN, GRU: SparseGRU, LSTM: SparseLSTM}


def classes_of(layer: RNNBase) -> tuple[type[RNNBase], type[RNNBase]]:
    """Return the dense class that `layer`, an nn.RNN, nn.GRU or nn.LSTM, is an instance of, and the training class."""
    return next((dense, training) for dense, training in TRAINING_CLASSES.items() if isinstance(layer, dense))
