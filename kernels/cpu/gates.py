"""Nonlinear functions and cells, each from `Vector`s to a `Vector`, in float32, without a call or a branch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from triton_sparse_rnn.kernels.cpu.vector_code import Vector

# tanh(x) = x P(x^2) / Q(x^2) up to the limit, and what it is there beyond: the rational approximation of Eigen,
# highest power first, absolute error at most 2.5e-7. Where a multiply-add is two instructions it is at most 3.6e-7, six
# roundings instead of four: those of the quotient and the product with x, and both of the last step of P and of Q.
# By a reciprocal (`Vector.quotient`) it is at most 3.2e-7.
# From _TANH_ONE on 1 is nearer. That these values are exact matters to infinity: a gate that is closed by it is 0, and
# not a small number times infinity.
_TANH_LIMIT = 7.90531110763549805
_TANH_ONE = 8.32
_TANH_P = (
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928875436e-04,
    4.89352455891786e-03,
)
_TANH_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)


class Gates(Protocol):
    """A vector of each gate, of which a cell takes each once."""

    def __getitem__(self, gate: int, /) -> Vector: ...


def tanh(x: Vector) -> Vector:
    inside = x.where("<", -_TANH_LIMIT, -_TANH_LIMIT, x.where(">", _TANH_LIMIT, _TANH_LIMIT, x))
    square = inside * inside
    value = (inside * _polynomial(square, _TANH_P)).quotient(_polynomial(square, _TANH_Q))
    return x.where("<", -_TANH_ONE, -1.0, x.where(">", _TANH_ONE, 1.0, value))


def relu(x: Vector) -> Vector:
    return x.where("<", 0.0, 0.0, x)


def sigmoid(x: Vector) -> Vector:
    return tanh(x * 0.5) * 0.5 + 0.5


def gru_cell(projected: Gates, recurrent: Gates, h: Vector) -> Vector:
    """Advance hidden units by one time step.

    Args:
        projected: W_i x + b_i of the gates r, z, n.
        recurrent: W_h h + b_h of the gates r, z, n.
        h: the units before the step.
    """
    r = sigmoid(projected[0] + recurrent[0])
    z = sigmoid(projected[1] + recurrent[1])
    n = tanh(projected[2] + r * recurrent[2])
    return n + z * (h - n)


def lstm_cell(projected: Gates, recurrent: Gates, c: Vector) -> tuple[Vector, Vector]:
    """Advance hidden units by one time step; returns h and c.

    Args:
        projected: W_i x + b_i of the gates i, f, g, o.
        recurrent: W_h h + b_h of the gates i, f, g, o.
        c: the cell states before the step.
    """
    i = sigmoid(projected[0] + recurrent[0])
    f = sigmoid(projected[1] + recurrent[1])
    c = f * c + i * tanh(projected[2] + recurrent[2])
    return sigmoid(projected[3] + recurrent[3]) * tanh(c), c


def _polynomial(x: Vector, coefficients: Sequence[float]) -> Vector:
    value = x.code.constant(coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value
