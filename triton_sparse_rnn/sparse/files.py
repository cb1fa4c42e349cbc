"""The file that holds a sparse model: one safetensors file that is refused whole when a byte of it is wrong.

Its metadata holds four texts: format and version of the file, a description in JSON that belongs to the caller, and a
SHA-256 of description and tensors. The digest finds damage; it is no signature and does not find forgery.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from triton_sparse_rnn.atomic_files import write_atomically
from triton_sparse_rnn.errors import SparseFileError

FORMAT, VERSION = "triton-sparse-rnn", "1"
_LENGTH_BYTES = 8  # of the header: a safetensors file begins with them
_LONGEST_HEADER = 100_000_000  # that safetensors reads


def write_file(path: str | os.PathLike[str], tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Write tensors and a description; see `write_atomically` for what becomes of a file that was there.

    Tensors that are one and the same are stored once, and come back as one; views of one storage come back apart. The
    same tensors and description give the same bytes.

    Raises:
        ValueError: a tensor has no numbers to store, or a layout or dtype that safetensors cannot hold.
        OSError: the file cannot be written.
    """
    stored, aliases = _separate(tensors)
    text = json.dumps({"aliases": aliases, "content": description}, sort_keys=True)
    metadata = {"format": FORMAT, "version": VERSION, "description": text, "sha256": _digest(stored, text)}
    try:
        content = save(stored, metadata=metadata)
    except KeyError as error:  # safetensors looks dtypes up in a table
        names = [name for name, tensor in stored.items() if tensor.dtype in error.args]
        raise ValueError(
            f"{', '.join(names)} must have a dtype that safetensors can hold, got {error}; convert it, or keep it out "
            "of the state_dict with register_buffer(..., persistent=False)"
        ) from error
    write_atomically(path, _in_order(content))


def _in_order(content: bytes) -> tuple[bytes, bytes, memoryview]:
    """A safetensors file in parts, its metadata sorted: safetensors writes them in an order that changes at random."""
    start = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    header = json.loads(content[_LENGTH_BYTES:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors behind it begin at whole words
    return len(text).to_bytes(_LENGTH_BYTES, "little"), text, memoryview(content)[start:]


def read_file(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what `write_file` wrote, on the CPU.

    Raises:
        SparseFileError: the file is truncated, damaged, of a newer version, or not one of ours.
        OSError: it cannot be read at all.
    """
    path = Path(path)
    with open_regular(path) as file:
        metadata = _read_metadata(path, file)
        if metadata.get("format") != FORMAT or "description" not in metadata:
            raise SparseFileError(f"{path} was not written by save_sparse(); nothing was loaded")
        if metadata.get("version") != VERSION:
            raise SparseFileError(
                f"{path} has version {metadata.get('version')} of the file format, this package reads version "
                f"{VERSION}; nothing was loaded. A newer triton-sparse-rnn may read it."
            )
        file.seek(0)
        tensors = _read_tensors(path, file)
    if _digest(tensors, metadata["description"]) != metadata.get("sha256"):
        raise SparseFileError(f"{path} is damaged: its content does not match its SHA-256; nothing was loaded")
    try:
        described = json.loads(metadata["description"])
        return tensors | {name: tensors[same] for name, same in described["aliases"].items()}, described["content"]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise SparseFileError(f"{path} describes its tensors wrongly ({error!r}); nothing was loaded") from error


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read it; what is no file, such as a pipe, on which one might wait for ever, raises OSError."""
    if not (path.is_dir() or stat.S_ISREG(path.stat().st_mode)):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return path.open("rb")


def _read_metadata(path: Path, file: BinaryIO) -> dict[str, Any]:
    """The metadata alone: what is not ours may be large, and is not read any further."""
    start = file.read(_LENGTH_BYTES)
    length = int.from_bytes(start, "little")
    left = os.fstat(file.fileno()).st_size - _LENGTH_BYTES
    if len(start) < _LENGTH_BYTES or length > min(left, _LONGEST_HEADER):
        raise _damaged(path, "it is too short for its header" if length > left else f"a header of {length} bytes")
    try:
        metadata = json.loads(file.read(length)).get("__metadata__")
    except (AttributeError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    return metadata if isinstance(metadata, dict) else {}


def _read_tensors(path: Path, file: BinaryIO) -> dict[str, Tensor]:
    """All tensors, in memory of their own.

    They are not read through a mapping of the file: if that was cut off meanwhile, the process would end by SIGBUS.
    """
    try:
        tensors = load(file.read())
    except (SafetensorError, RuntimeError, ValueError, LookupError, TypeError) as error:
        raise _damaged(path, error) from error
    return {name: _copy(tensors.pop(name)) for name in list(tensors)}


def _damaged(path: Path, why: object) -> SparseFileError:
    return SparseFileError(f"{path} is not a safetensors file or is truncated or damaged ({why}); nothing was loaded")


def _separate(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split into tensors that share no memory, and names of tensors that are the same as one of these."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_nested:
            raise ValueError(f"{name} must be a tensor with numbers, got {_kind(tensor)}")
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


def _kind(tensor: Tensor) -> str:
    return "a nested one" if tensor.is_nested else f"layout {tensor.layout} on {tensor.device}"


def _copy(tensor: Tensor) -> Tensor:
    """Copy byte for byte into memory as torch aligns it. A clone would mend what is damaged in a bool."""
    return _bytes(tensor).clone().view(tensor.dtype).view(tensor.shape)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _digest(tensors: dict[str, Tensor], description: str) -> str:
    digest = hashlib.sha256(description.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(_bytes(tensor.cpu()).numpy().data)
    return digest.hexdigest()
