"""Converted layers out of a file of save_sparse, without the model that they were saved with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from triton_sparse_rnn.errors import SparseFileError
from triton_sparse_rnn.nn.persistent import PersistentGRU, PersistentLayer, PersistentLSTM, PersistentRNN
from triton_sparse_rnn.nn.storage import buffer_names, from_buffers
from triton_sparse_rnn.sparse.block_matrix import STORAGE_DTYPES, BlockMatrix
from triton_sparse_rnn.sparse.files import read_file
from triton_sparse_rnn.sparse.layer_config import LayerConfig

_CLASSES = {"RNN_TANH": PersistentRNN, "RNN_RELU": PersistentRNN, "GRU": PersistentGRU, "LSTM": PersistentLSTM}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORAGE_DTYPES}


def read_layers(path: str | os.PathLike[str]) -> dict[str, PersistentLayer]:
    """Return the recurrent layers of a file by their names in the model, "" for a model that is one.

    A layer of a subclass of PersistentGRU comes back as PersistentGRU: only its numbers are read.

    Args:
        path: what `save_sparse` wrote.
    Raises:
        SparseFileError: the file is truncated, damaged or foreign.
        OSError: it cannot be read at all.
    """
    tensors, description = read_file(path)
    layers: dict[str, PersistentLayer] = {}
    try:
        for name, described in description["modules"].items():
            layers[name] = _build(name, described, tensors)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise SparseFileError(f"{path} describes its layers wrongly ({error!r}); nothing was loaded") from error
    return layers


def as_model(layers: Mapping[str, PersistentLayer]) -> nn.Module:
    """Return a model that has the layers at their names, and nothing else.

    >>> as_model({"encoder.rnn": PersistentGRU.from_dense(nn.GRU(2, 3), storage=(16, 1))}).encoder.rnn.hidden_size
    3
    """
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


def _build(name: str, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PersistentLayer:
    config, prefix = LayerConfig(**described["config"]), f"{name}." if name else ""
    held: dict[str, Tensor | None] = {
        buffer: tensors[prefix + buffer] for buffer in buffer_names(config) if prefix + buffer in tensors
    }
    weights: dict[str, BlockMatrix | Tensor] = {}
    for weight_name in config.weight_names():
        weights[weight_name] = weight = from_buffers(config, weight_name, held)
        if isinstance(weight, BlockMatrix):
            weight.check()
        elif weight.shape != config.weight_shape(weight_name):
            raise ValueError(f"{weight_name} is of shape {tuple(weight.shape)}")
    rounded = described["activation_dtype"]
    return _CLASSES[config.mode](
        config,
        weights,
        dtype=_DTYPES[described["dtype"]],
        activation_dtype=None if rounded is None else getattr(torch, rounded),
    )
