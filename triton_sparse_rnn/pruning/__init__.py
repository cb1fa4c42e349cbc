"""Gradual pruning: schedules, the pruner, penalties, a teacher, and a forecast of what comes out."""

from triton_sparse_rnn.pruning.distillation import Distillation, divergence
from triton_sparse_rnn.pruning.forecast import forecast
from triton_sparse_rnn.pruning.penalties import group_lasso, l1
from triton_sparse_rnn.pruning.pruner import Pruner
from triton_sparse_rnn.pruning.schedules import ConstantMask, OneShot, PolynomialDecay, Schedule, ThresholdRamp

__all__ = [
    "ConstantMask",
    "Distillation",
    "OneShot",
    "PolynomialDecay",
    "Pruner",
    "Schedule",
    "ThresholdRamp",
    "divergence",
    "forecast",
    "group_lasso",
    "l1",
]
