"""Small trainings under a pruner, for the tests beside this file."""

from typing import Any

import torch
from torch import nn

from triton_sparse_rnn.pruning import OneShot, Pruner

NOW = OneShot(sparsity=0.5, step=1)


def gru(*sizes: int, **options: Any) -> Any:
    """An nn.GRU whose attributes a type checker need not know."""
    return nn.GRU(*sizes, **options)


def backward(layer, seed=0):
    x = torch.randn(4, 3, layer.input_size, generator=torch.Generator().manual_seed(seed))
    layer(x)[0].square().mean().backward()


def train(layer, optimizer, steps, after=lambda: None):
    for step in range(steps):
        optimizer.zero_grad()
        backward(layer, seed=step)
        optimizer.step()
        after()


def attached(layer, schedule, optimizer=None, **options):
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02) if optimizer is None else optimizer
    pruner = Pruner(layer, schedule, **options)
    pruner.attach(optimizer)
    return pruner, optimizer


def pruned_gru(steps=0):
    """A GRU of which half is pruned with the first step of its Adam: itself, the pruner and the optimizer."""
    layer = gru(5, 7)
    pruner, optimizer = attached(layer, NOW)
    train(layer, optimizer, steps)
    return layer, pruner, optimizer


def zero_half(layer):
    """Set to zero, in a GRU of 8 units, every second column of the first 4 units of each gate: blocks of 4 x 1."""
    with torch.no_grad():
        for weight in (layer.weight_ih_l0, layer.weight_hh_l0):
            weight.view(3, 2, 4, -1)[:, 0, :, ::2] = 0
    return layer


def masked_everywhere(pruner, optimizer=None):
    """Whether weights, gradients and optimizer state are zero where the masks say so, and something is pruned."""
    tensors = []
    for weight in pruner.weights:
        tensors += [(weight, weight.parameter), (weight, weight.parameter.grad)]
        state = {} if optimizer is None else optimizer.state[weight.parameter]
        tensors += [(weight, value) for value in state.values() if value.shape == weight.parameter.shape]
    masks = pruner.masks
    return pruner.sparsity > 0 and not any(tensor[~masks[weight.name]].any() for weight, tensor in tensors)


def zeros_hold(pruner):
    """Whether weights are zero where the masks say so, and something is pruned."""
    return pruner.sparsity > 0 and not any(
        weight.parameter[~pruner.masks[weight.name]].any() for weight in pruner.weights
    )
