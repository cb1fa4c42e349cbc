"""Read the weights of a model from whatever kind of checkpoint a file is, without running code from it."""

from __future__ import annotations

import math
import os
import reprlib
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triton_sparse_rnn.nn.storage import from_buffers, to_buffers
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.files import FORMAT, open_regular, read_file
from triton_sparse_rnn.sparse.layer_config import LayerConfig

STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict", "module")  # under which trainers keep a state_dict
_ALWAYS_READ_BYTES, _MOST_TIMES = 1 << 30, 1000  # what tensors may take in memory; times the size of their file


class CheckpointFileError(ValueError):
    """A file cannot be read as a checkpoint; the message names it, and why."""


def read_state_dict(path: Path) -> dict[str, Tensor | BlockMatrix]:
    """Return the tensors of a checkpoint by name; weights in a file of `save_sparse` come as BlockMatrix.

    Args:
        path: a safetensors file, or what torch.save wrote of a state_dict or of a dict with one under "state_dict",
            "model", "model_state_dict" or "module".
    Raises:
        CheckpointFileError: there is no such file, it is damaged, it holds no named tensors, or these would take more
            than a thousand times its size in memory.
    """
    try:
        with open_regular(path) as file:
            start = file.read(9)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CheckpointFileError(f"{path}: {error.strerror or error}") from None
    if not start:
        raise CheckpointFileError(f"{path}: the file is empty")
    state = _read_safetensors(path) if start[8:9] == b"{" else _unwrapped(path, read_torch_file(path))
    _check_what_it_stands_for(path, size, state)
    return state


def _unwrapped(path: Path, content: Any) -> dict[str, Tensor | BlockMatrix]:
    """The tensors in what torch.save wrote."""
    state, seen = content, set()
    while isinstance(state, Mapping) and not any(isinstance(value, Tensor) for value in state.values()):
        seen.add(id(state))  # a dict may hold itself
        held = [state.get(key) for key in STATE_DICT_KEYS]
        state = next((inner for inner in held if isinstance(inner, Mapping) and id(inner) not in seen), None)
    if not isinstance(state, Mapping):
        held = (
            f"a dict of {reprlib.repr([*content])}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        )
        raise CheckpointFileError(f"{path}: holds no state_dict, but {held}")
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def _check_what_it_stands_for(path: Path, size: int, state: Mapping[str, Tensor | BlockMatrix]) -> None:
    """Refuse tensors of which the file holds next to nothing: expanded or sparse, of a shape that could be any."""
    total = 0
    for name, value in state.items():
        if isinstance(value, Tensor) and (value.is_nested or value.is_meta):
            continue  # has no numbers that a report would read
        itemsize = value.element_size() if isinstance(value, Tensor) else value.values.element_size()
        total += math.prod(value.shape) * itemsize
        if total > max(_ALWAYS_READ_BYTES, _MOST_TIMES * size):
            raise CheckpointFileError(
                f"{path}: {name} of shape {tuple(value.shape)} would take {total:,} bytes, and the whole file has "
                f"{size:,}: damaged or forged"
            )


def read_torch_file(path: Path) -> Any:
    """Return what torch.save wrote to `path`, on the CPU; only tensors and plain values are unpickled.

    Raises:
        CheckpointFileError: it is damaged, not such a file, or holds other objects.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if (member := archive.testzip()) is not None:  # torch.load does not look at the checksums
                    raise CheckpointFileError(f"{path}: damaged, wrong checksum of {member}")
        with warnings.catch_warnings(), torch.sparse.check_sparse_tensor_invariants(True):  # or indices are trusted
            warnings.simplefilter("ignore")  # of torch's own code for quantised tensors
            return torch.load(path, weights_only=True, map_location="cpu")
    except (CheckpointFileError, MemoryError):
        raise
    except Exception as error:  # what zipfile and torch.load raise on a damaged file has no common type
        if "weights_only" in str(error).lower() or "unsupported" in str(error).lower():
            reason = "it holds objects other than tensors, which are not loaded as they may run code, or it is damaged"
            advice = "save model.state_dict() instead"
            raise CheckpointFileError(f"{path}: {reason}; {advice}") from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointFileError(f"{path}: not a checkpoint, or damaged ({reason})") from error


def _read_safetensors(path: Path) -> dict[str, Tensor | BlockMatrix]:
    from safetensors import safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, framework="pt") as file:
            ours = (file.metadata() or {}).get("format") == FORMAT
        if not ours:
            return dict(load_file(path))
        tensors, description = read_file(path)
    except MemoryError:
        raise
    except Exception as error:  # SafetensorError, and what torch raises on a dtype or shape that it does not have
        raise CheckpointFileError(f"{path}: a damaged safetensors file ({error})") from error
    try:
        return _join_blocks(tensors, description)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointFileError(f"{path}: describes its weights wrongly ({error!r})") from error


def _join_blocks(tensors: dict[str, Tensor], description: dict[str, Any]) -> dict[str, Tensor | BlockMatrix]:
    """Put a BlockMatrix in the place of its parts in a file of `save_sparse`; raise if they do not fit."""
    joined: dict[str, Tensor | BlockMatrix] = {}
    for module, described in description["modules"].items():
        config, prefix = LayerConfig(**described["config"]), f"{module}.".lstrip(".")
        held = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for layer in range(config.num_layers):  # one by one: the file may tell any number
            for name in config.weight_names(layer):
                weight = from_buffers(config, name, held)
                if isinstance(weight, BlockMatrix):
                    weight.check()
                    joined[prefix + name] = weight
                    for part in to_buffers(name, weight):
                        del tensors[prefix + part]
    return joined | tensors
