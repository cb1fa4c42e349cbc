"""Recurrent layers that are pruned while they train and then run from sparse weights kept on chip."""

from triton_sparse_rnn.conversion import sparsify, to_dense, to_sparse, warm_up
from triton_sparse_rnn.errors import BackendUnavailableError, SparseFileError
from triton_sparse_rnn.export.c_export import export_c
from triton_sparse_rnn.nn import (
    GateGradientSparsity,
    GateGradientStats,
    PersistentConv1d,
    PersistentGRU,
    PersistentLinear,
    PersistentLSTM,
    PersistentRNN,
    SparseGRU,
    SparseLSTM,
    SparseRNN,
)
from triton_sparse_rnn.pruning import (
    ConstantMask,
    Distillation,
    OneShot,
    PolynomialDecay,
    Pruner,
    ThresholdRamp,
    divergence,
    forecast,
    group_lasso,
    l1,
)
from triton_sparse_rnn.report import sparsity_report
from triton_sparse_rnn.saving import load_sparse, save_sparse
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.patterns import Blocks
from triton_sparse_rnn.sparse.picks import Picks

__all__ = [
    "BackendUnavailableError",
    "BlockMatrix",
    "Blocks",
    "ConstantMask",
    "Distillation",
    "GateGradientSparsity",
    "GateGradientStats",
    "OneShot",
    "PersistentConv1d",
    "PersistentGRU",
    "PersistentLSTM",
    "PersistentLinear",
    "PersistentRNN",
    "Picks",
    "PolynomialDecay",
    "Pruner",
    "SparseFileError",
    "SparseGRU",
    "SparseLSTM",
    "SparseRNN",
    "ThresholdRamp",
    "divergence",
    "export_c",
    "forecast",
    "group_lasso",
    "l1",
    "load_sparse",
    "save_sparse",
    "sparsify",
    "sparsity_report",
    "to_dense",
    "to_sparse",
    "warm_up",
]
