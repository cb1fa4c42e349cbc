"""Find the recurrent and input weights of a model, by names that do not change when the model is wrapped."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from triton_sparse_rnn.sparse.layer_config import LayerConfig


def recurrent_weights(model: nn.Module) -> Iterator[tuple[str, nn.RNNBase, str]]:
    """Yield (path in the model, module, attribute) of each weight_ih and weight_hh of each nn.RNN, nn.GRU and nn.LSTM.

    >>> [path for path, _, _ in recurrent_weights(nn.Sequential(nn.GRU(3, 4)))]
    ['0.weight_ih_l0', '0.weight_hh_l0']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    for prefix, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            for attribute in LayerConfig.of(module).weight_names():
                if attribute.startswith(("weight_ih", "weight_hh")):
                    yield f"{prefix}.{attribute}".lstrip("."), module, attribute


def parameter_paths(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (path in the model, parameter) under all paths, where `recurrent_weights` and `find_parameter` find it.

    model.named_parameters() of a checkpoint wrapper leaves the wrapper out.
    """
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{attribute}".lstrip("."), parameter


def find_parameter(model: nn.Module, path: str) -> nn.Parameter | None:
    """What the model registers under this path; None where there is none, or a computed (parametrized) tensor."""
    prefix, _, attribute = path.rpartition(".")
    try:
        return model.get_submodule(prefix)._parameters.get(attribute)
    except AttributeError:
        return None


def gate_names(module: nn.RNNBase) -> str:
    """One letter for each gate, in the order in which they are stacked: "rzn", "ifgo" or "h"."""
    return LayerConfig.of(module).gate_names


def split_gates(weight: Tensor, gates: int) -> Tensor:
    """View a weight [G * H, ...] as [G, H, C], its trailing axes flattened."""
    return weight.flatten(1).unflatten(0, (gates, -1))
