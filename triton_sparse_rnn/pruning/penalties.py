"""Penalties to add to a loss, that draw the recurrent and input weights of a model towards zero."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from triton_sparse_rnn.names import clean_name
from triton_sparse_rnn.pruning.weights import gate_names, recurrent_weights, split_gates
from triton_sparse_rnn.sparse.patterns import Pattern, PatternLike, as_pattern
from triton_sparse_rnn.sparse.picks import DEFAULT_PATTERN


def group_lasso(model: nn.Module, pattern: PatternLike = DEFAULT_PATTERN) -> Tensor:
    """Sum the l2 norms of all blocks or picked units: sum_g ||w_g||_2 (Narang, Undersander, Diamos 2017, with pruning).

    Args:
        model: with nn.RNN, nn.GRU or nn.LSTM layers; their recurrent and input weights count, biases do not.
        pattern: as for the `Pruner`.

    Returns:
        A scalar to multiply by lambda and add to the loss. Its gradient at a unit of zeros is zero.

    Raises:
        TypeError, ValueError: `model` has no such layer, or `pattern` is none or far larger than a weight.

    >>> import torch
    >>> layer = nn.RNN(1, 2, bias=False)
    >>> layer.weight_ih_l0.data = torch.tensor([[3.0], [4.0]])
    >>> layer.weight_hh_l0.data = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    >>> group_lasso(layer, pattern=(2, 1)).item()
    6.0
    """
    pattern = as_pattern(pattern)
    return _total(_norm(name, weight, pattern) for name, weight in _stacked_weights(model))


def l1(model: nn.Module) -> Tensor:
    """Sum |w| over the same weights as `group_lasso`; a scalar, whose gradient at zero is zero.

    >>> layer = nn.RNN(1, 2, bias=False)
    >>> for parameter in layer.parameters():
    ...     _ = nn.init.constant_(parameter, -0.5)
    >>> l1(layer).item()
    3.0
    """
    return _total(weight.abs().sum() for _, weight in _stacked_weights(model))


def _norm(name: str, weight: Tensor, pattern: Pattern) -> Tensor:
    pattern.check_size(weight.shape[1], weight.shape[2], f"each gate of {name}")
    return pattern.norms(weight).sum()


def _stacked_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The names of weights, and they as [G, H, C]; one that is tied counts once."""
    seen = set()
    for path, module, attribute in recurrent_weights(model):
        weight = getattr(module, attribute)
        if id(weight) not in seen:
            seen.add(id(weight))
            yield clean_name(path), split_gates(weight, len(gate_names(module)))


def _total(terms: Iterator[Tensor]) -> Tensor:
    total = next(terms, None)
    if total is None:
        raise ValueError("model has no nn.RNN, nn.GRU or nn.LSTM whose weights could be penalised")
    for term in terms:
        total = total + term.to(total.device)
    return total
