"""Pruned linear layers on the package's kernels.

A linear layer with ReLU is an nn.RNN whose recurrent weights are zero, h_t = relu(W x_t + b), so it can be converted
like one. With a sigmoid it is one of tanh: sigmoid(z) = (1 + tanh(z / 2)) / 2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from triton_sparse_rnn import PersistentRNN


class BlockLinear(nn.Module):
    """A linear layer and the activation behind it, from block-sparse weights.

    Args:
        linear: with biases; stays as it is.
        activation: nn.ReLU or nn.Sigmoid.
        weight_dtype: as for `to_sparse`.
    """

    def __init__(self, linear: nn.Linear, activation: nn.Module, weight_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.is_sigmoid = isinstance(activation, nn.Sigmoid)
        nonlinearity = "tanh" if self.is_sigmoid else "relu"
        rnn = nn.RNN(linear.in_features, linear.out_features, nonlinearity=nonlinearity, batch_first=True)
        scale = 0.5 if self.is_sigmoid else 1.0
        with torch.no_grad():
            for parameter in rnn.parameters():
                parameter.zero_()
            rnn.get_parameter("weight_ih_l0").copy_(scale * linear.weight)
            rnn.get_parameter("bias_ih_l0").copy_(scale * linear.bias)
        self.rnn = PersistentRNN.from_dense(rnn, weight_dtype=weight_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Take whole sequences [B, T, in] or one step [B, in]."""
        y = self.rnn(x)[0] if x.dim() == 3 else self.rnn.step(x)[0]
        return (1 + y) / 2 if self.is_sigmoid else y


def convert_linear(layers: nn.Sequential, weight_dtype: torch.dtype | None = None) -> nn.Sequential:
    """Return the same function of linear layers, each followed by its activation, from block-sparse weights."""
    modules = list(layers)
    converted = []
    for linear, activation in zip(modules[::2], modules[1::2], strict=True):
        assert isinstance(linear, nn.Linear)
        converted.append(BlockLinear(linear, activation, weight_dtype))
    return nn.Sequential(*converted)
