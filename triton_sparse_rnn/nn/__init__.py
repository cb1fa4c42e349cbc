"""The modules: for training (training.py) and for inference (persistent.py, persistent_linear.py)."""

from triton_sparse_rnn.gate_gradients.options import GateGradientSparsity
from triton_sparse_rnn.gate_gradients.stats import GateGradientStats
from triton_sparse_rnn.nn.persistent import PersistentGRU, PersistentLSTM, PersistentRNN
from triton_sparse_rnn.nn.persistent_linear import PersistentConv1d, PersistentLinear
from triton_sparse_rnn.nn.training import SparseGRU, SparseLSTM, SparseRNN

__all__ = [
    "GateGradientSparsity",
    "GateGradientStats",
    "PersistentConv1d",
    "PersistentGRU",
    "PersistentLSTM",
    "PersistentLinear",
    "PersistentRNN",
    "SparseGRU",
    "SparseLSTM",
    "SparseRNN",
]
