"""Read the weights of a model from whatever kind of checkpoint a file is, without running code from it."""

from __future__ import annotations

import operator
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triton_sparse_rnn.errors import SparseFileError
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix

WRAPPERS = ("state_dict", "model", "model_state_dict", "module")  # under which trainers keep a state_dict


class CheckpointFileError(ValueError):
    """A file cannot be read as a checkpoint; the message names it, and why."""


def read_state_dict(path: Path) -> dict[str, Tensor | BlockMatrix]:
    """Return the tensors of a checkpoint by name; weights in a file of `save_sparse` come as BlockMatrix.

    Args:
        path: a safetensors file, or what torch.save wrote of a state_dict or of a dict with one under "state_dict",
            "model", "model_state_dict" or "module".
    Raises:
        CheckpointFileError: there is no such file, it is damaged, or it holds no named tensors.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointFileError(f"{path}: {error.strerror or error}") from None
    if not start:
        raise CheckpointFileError(f"{path}: the file is empty")
    if start[8:9] == b"{":
        return _read_safetensors(path)
    content = state = read_torch_file(path)
    while isinstance(state, Mapping) and not any(isinstance(value, Tensor) for value in state.values()):
        state = next((state[key] for key in WRAPPERS if isinstance(state.get(key), Mapping)), None)
    if not isinstance(state, Mapping):
        held = f"a dict of {[*content][:9]}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise CheckpointFileError(f"{path}: holds no state_dict, but {held}")
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


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
        return torch.load(path, weights_only=True, map_location="cpu")
    except CheckpointFileError:
        raise
    except Exception as error:  # what zipfile and torch.load raise on a damaged file has no common type
        if "weights_only" in str(error).lower() or "unsupported" in str(error).lower():
            reason = "it holds objects other than tensors, which are not loaded as they may run code, or it is damaged"
            advice = "save model.state_dict() instead"
            raise CheckpointFileError(f"{path}: {reason}; {advice}") from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointFileError(f"{path}: not a checkpoint, or damaged ({reason})") from error


def _read_safetensors(path: Path) -> dict[str, Tensor | BlockMatrix]:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    from triton_sparse_rnn.sparse.files import FORMAT, read_file

    try:
        with safe_open(path, framework="pt") as file:
            ours = (file.metadata() or {}).get("format") == FORMAT
        if not ours:
            return dict(load_file(path))
        tensors, description = read_file(path)
    except (SafetensorError, SparseFileError) as error:
        raise CheckpointFileError(f"{path}: a damaged safetensors file ({error})") from error
    try:
        return _join_blocks(tensors, description)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointFileError(f"{path}: describes its weights wrongly ({error!r})") from error


def _join_blocks(tensors: dict[str, Tensor], description: dict[str, Any]) -> dict[str, Tensor | BlockMatrix]:
    """Put a BlockMatrix in the place of its parts in a file of `save_sparse`; raise if they do not fit."""
    from triton_sparse_rnn.nn.weight_storage import MATRIX_PARTS

    joined: dict[str, Tensor | BlockMatrix] = {}
    for module, described in description["modules"].items():
        for weight, matrix in described["weights"].items():
            name = f"{module}.{weight}".lstrip(".")
            parts: dict[str, Any] = {part: tensors.pop(f"{name}_{part}", None) for part in MATRIX_PARTS}
            rows, columns, gates = map(operator.index, (*matrix["shape"], matrix["gates"]))
            if gates < 1 or rows % gates:
                raise ValueError(f"{name} cannot have {gates} gates in {rows} rows")
            joined[name] = weight_blocks = BlockMatrix(**parts, shape=(rows, columns), gates=gates)
            weight_blocks.check()
    return joined | tensors
