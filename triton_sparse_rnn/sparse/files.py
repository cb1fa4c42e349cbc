"""The file that holds a sparse model: one safetensors file that is refused whole when a byte of it is wrong.

Its metadata holds four texts: format and version of the file, a description in JSON that belongs to the caller, and a
SHA-256 of description and tensors. The digest finds damage; it is no signature and does not find forgery.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from triton_sparse_rnn.errors import SparseFileError

FORMAT, VERSION = "triton-sparse-rnn", "1"


def write_file(path: str | os.PathLike[str], tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Write tensors and a description; a file that was there is replaced in one go or, on an error, kept.

    Tensors that are one and the same are stored once, and come back as one; views of one storage come back apart.

    Raises:
        ValueError: a tensor has no numbers to store, or a layout or dtype that safetensors cannot hold.
    """
    stored, aliases = _separate(tensors)
    text = json.dumps({"aliases": aliases, "content": description}, sort_keys=True)
    metadata = {"format": FORMAT, "version": VERSION, "description": text, "sha256": _digest(stored, text)}
    path = Path(path)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}"
    temporary.touch(exist_ok=False)
    usual_mode = temporary.stat().st_mode
    try:
        save_file(stored, temporary, metadata=metadata)
        temporary.chmod(usual_mode)  # safetensors may have replaced it by a private file
        temporary.replace(path)
    except KeyError as error:  # safetensors looks dtypes up in a table
        names = [name for name, tensor in stored.items() if tensor.dtype in error.args]
        raise ValueError(
            f"{', '.join(names)} must have a dtype that safetensors can hold, got {error}; convert it, or keep it out "
            "of the state_dict with register_buffer(..., persistent=False)"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_file(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what `write_file` wrote, on the CPU.

    Raises:
        SparseFileError: the file is truncated, damaged, of a newer version, or not one of ours.
        OSError: it cannot be read at all.
    """
    path = Path(path)
    with path.open("rb"):  # says what is wrong with the path in the usual words
        pass
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: _copy(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise SparseFileError(
            f"{path} is not a safetensors file or is truncated or damaged ({error}); nothing was loaded"
        ) from error
    if metadata.get("format") != FORMAT or "description" not in metadata:
        raise SparseFileError(f"{path} was not written by save_sparse(); nothing was loaded")
    if metadata.get("version") != VERSION:
        raise SparseFileError(
            f"{path} has version {metadata.get('version')} of the file format, this package reads version {VERSION}; "
            "nothing was loaded. A newer triton-sparse-rnn may read it."
        )
    if _digest(tensors, metadata["description"]) != metadata.get("sha256"):
        raise SparseFileError(f"{path} is damaged: its content does not match its SHA-256; nothing was loaded")
    try:
        described = json.loads(metadata["description"])
        return tensors | {name: tensors[same] for name, same in described["aliases"].items()}, described["content"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SparseFileError(f"{path} describes its tensors wrongly ({error!r}); nothing was loaded") from error


def _separate(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split into tensors that share no memory, and names of tensors that are the same as one of these."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout != torch.strided:
            raise ValueError(f"{name} must be a tensor with numbers, got layout {tensor.layout} on {tensor.device}")
        tensor = tensor.detach().resolve_conj().resolve_neg()
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and identity in names:
            aliases[name] = names[identity]
            continue
        names[identity] = name
        storage = tensor.untyped_storage().data_ptr()
        tensor = tensor.contiguous().clone() if storage in storages else tensor.contiguous()
        storages.add(storage)
        stored[name] = tensor
    return stored, aliases


def _copy(tensor: Tensor) -> Tensor:
    """Copy byte for byte: get_tensor maps the file, and who writes to it later would change the weights.

    A clone would mend what is damaged in a bool.
    """
    return _bytes(tensor).clone().view(tensor.dtype).view(tensor.shape)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _digest(tensors: dict[str, Tensor], description: str) -> str:
    digest = hashlib.sha256(description.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(_bytes(tensor.cpu()).numpy().data)
    return digest.hexdigest()
