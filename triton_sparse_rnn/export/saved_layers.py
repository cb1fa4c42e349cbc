"""Layers out of a file of save_sparse, without the code of the model that they were saved with."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from triton_sparse_rnn.errors import SparseFileError
from triton_sparse_rnn.nn.persistent import PersistentGRU, PersistentLayer, PersistentLSTM, PersistentRNN
from triton_sparse_rnn.nn.storage import buffer_names, from_buffers
from triton_sparse_rnn.sparse.block_matrix import STORAGE_DTYPES, BlockMatrix
from triton_sparse_rnn.sparse.files import read_file
from triton_sparse_rnn.sparse.layer_config import LayerConfig

FUNCTION_NAMES: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}
_CLASSES = {"RNN_TANH": PersistentRNN, "RNN_RELU": PersistentRNN, "GRU": PersistentGRU, "LSTM": PersistentLSTM}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORAGE_DTYPES}


class OneWeight(nn.Module):
    """A linear layer as a file holds it, stored without the zeros: its numbers, and no call."""

    def __init__(self, weight: BlockMatrix, bias: Tensor | None, activation_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.weight, self.bias, self.activation_dtype = weight, bias, activation_dtype


def read_model(path: str | os.PathLike[str], names: Sequence[str] | None = None) -> nn.Module:
    """Return a model of layers at their names in the saved one, and of nothing else; or the layer that was the model.

    A layer of a subclass of PersistentGRU comes back as PersistentGRU: only its numbers are read.

    Args:
        path: what `save_sparse` wrote.
        names: of layers, among them linear ones that were not converted (a weight of two axes, and a bias), and "relu",
            "sigmoid" and "tanh"; None for all that were converted.
    Raises:
        SparseFileError: the file is truncated, damaged or foreign.
        ValueError: it has no layer of a name.
        OSError: it cannot be read at all.
    """
    tensors, description = read_file(path)
    try:
        described = description["modules"]
        layers = {name: _build(name, described[name], tensors) for name in described if names is None or name in names}
        others = sorted(name for name in map(_owner_of_weight, tensors) if name is not None and name not in described)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise SparseFileError(f"{path} describes its layers wrongly ({error!r}); nothing was loaded") from error
    for name in [] if names is None else names:
        if name in others and (weight := tensors[f"{name}.weight"]).dim() == 2 and weight.is_floating_point():
            layers[name] = _dense_linear(weight, tensors.get(f"{name}.bias"))
        elif name in FUNCTION_NAMES and name not in layers:
            layers[name] = FUNCTION_NAMES[name]()
        elif name not in layers:
            raise ValueError(
                f"it holds no layer {name!r}, but {', '.join(map(repr, described))} that were converted"
                + (f", and {', '.join(map(repr, others))}" if others else "")
            )
    return layers[""] if "" in layers else _as_model(layers)


def _owner_of_weight(key: str) -> str | None:
    name, _, last = key.rpartition(".")
    return name if name and last == "weight" else None


def _as_model(layers: Mapping[str, nn.Module]) -> nn.Module:
    model = nn.Module()
    for name, layer in layers.items():
        *folders, last = name.split(".")
        place = model
        for folder in folders:
            if folder not in place._modules:
                place.add_module(folder, nn.Module())
            place = place.get_submodule(folder)
        place.add_module(last, layer)
    return model


def _build(name: str, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    prefix, config, rounded = f"{name}." if name else "", described["config"], described["activation_dtype"]
    activation_dtype = None if rounded is None else getattr(torch, rounded)
    if "mode" not in config:
        return _build_linear(prefix, config, activation_dtype, tensors)
    recurrent = LayerConfig(**config)
    weights = _read_weights(prefix, recurrent, tensors)
    layer_class: type[PersistentLayer] = _CLASSES[recurrent.mode]
    return layer_class(recurrent, weights, dtype=_DTYPES[described["dtype"]], activation_dtype=activation_dtype)


def _build_linear(
    prefix: str, config: Mapping[str, Any], activation_dtype: torch.dtype | None, tensors: Mapping[str, Tensor]
) -> OneWeight:
    parts = {part: tensors.get(f"{prefix}weight_{part}") for part in BlockMatrix.PARTS}
    weight = BlockMatrix.from_parts(parts, shape=(config["out_features"], config["in_features"]), gates=1)
    weight.check()
    bias = tensors[f"{prefix}bias"] if config["bias"] else None
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is of shape {tuple(bias.shape)}")
    return OneWeight(weight, bias, activation_dtype)


def _dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _read_weights(prefix: str, config: LayerConfig, tensors: Mapping[str, Tensor]) -> dict[str, BlockMatrix | Tensor]:
    """Return the weights of a recurrent layer, checked to be of its sizes before anything computes with them."""
    held = {name: tensors[prefix + name] for name in buffer_names(config) if prefix + name in tensors}
    weights = {name: from_buffers(config, name, held) for name in config.weight_names()}
    for name, weight in weights.items():
        if isinstance(weight, BlockMatrix):
            weight.check()
        elif weight.shape != config.weight_shape(name):
            raise ValueError(f"{name} is of shape {tuple(weight.shape)}")
    return weights
