"""export_c: the folder that a C program is built from."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import nn

from triton_sparse_rnn.atomic_files import write_atomically
from triton_sparse_rnn.export.blob import make_blob
from triton_sparse_rnn.export.c_text import array_source, model_header
from triton_sparse_rnn.export.chain import c_layers, has_one_weight
from triton_sparse_rnn.names import clean_name
from triton_sparse_rnn.nn.persistent import PersistentLayer

DATA = ("blob", "array")
RUNTIME_FILES = ("tsr_runtime.h", "tsr_runtime.c", "tsr_blob.h", "tsr_products.h", "tsr_vectors.h")


def export_c(
    model: nn.Module | Sequence[nn.Module],
    folder: str | os.PathLike[str],
    *,
    chain: Sequence[str] | None = None,
    name: str | None = None,
    data: str = "blob",
) -> list[Path]:
    """Write converted layers as plain C11, which needs no library, no Python and no memory but what it is given.

    The folder gets a runtime, the same for all models (tsr_runtime.h says how it is called), and for each chain of
    layers NAME.h with its sizes and NAME.bin or NAME.c with its weights. A chain is one model to the runtime: one init,
    reset and step, from the inputs of its first layer to the outputs of its last one. It takes float32, whatever the
    weights are stored in; results are those of the layers within the rounding of float32. Files that were there before
    are replaced.

    Args:
        model: what is exported: a PersistentRNN, PersistentGRU or PersistentLSTM or a linear layer alone; an
            nn.Sequential or a sequence of these, with nn.ReLU, nn.Sigmoid, nn.Tanh, nn.Identity and nn.Dropout between
            them, as one chain; or any model, of which every converted layer is exported by itself, under its name.
        folder: made if it is not there.
        chain: of any model, names of submodules that are one chain, in this order.
        name: of the files and constants, a C identifier; None for "model", or for layers of a model their own names,
            which else follow it.
        data: "blob" writes NAME.bin, which a program reads or maps, "array" NAME.c, which is compiled in.
    Returns:
        The files that were written.
    Raises:
        TypeError, ValueError: an argument is wrong, or a layer cannot be exported; it is named, and nothing is written.
        OSError: a file cannot be written.

    >>> import tempfile
    >>> from triton_sparse_rnn import PersistentGRU
    >>> layer = nn.GRU(4, 8)
    >>> _ = layer.weight_ih_l0.data.fill_(0), layer.weight_hh_l0.data.fill_(0)  # pruned
    >>> layer = PersistentGRU.from_dense(layer)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     print(*(path.name for path in export_c(layer, folder, name="gru")))
    tsr_runtime.h tsr_runtime.c tsr_blob.h tsr_products.h tsr_vectors.h gru.h gru.bin
    """
    if data not in DATA:
        raise ValueError(f"data must be one of {', '.join(map(repr, DATA))}, got {data!r}")
    if name is not None:
        _check_name(name)
    folder, written = Path(folder), {}
    for chain_name, modules in _chains(model, chain, name):
        layers = c_layers(modules)
        blob = make_blob(layers)
        written[f"{chain_name}.h"] = model_header(chain_name, layers, blob, _maker(), is_array=data == "array")
        if data == "array":
            written[f"{chain_name}.c"] = array_source(chain_name, blob, _maker())
        else:
            written[f"{chain_name}.bin"] = blob
    files = {file: _runtime_file(file) for file in RUNTIME_FILES} | written
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        write_atomically(folder / file, (content,))
    return [folder / file for file in files]


def _chains(
    model: nn.Module | Sequence[nn.Module], chain: Sequence[str] | None, name: str | None
) -> Iterator[tuple[str, list[tuple[str, nn.Module]]]]:
    """Yield each chain: its name, and its modules with theirs."""
    if not isinstance(model, nn.Module):
        if chain is not None:
            raise ValueError("chain must be None where model is a sequence of layers, which is a chain itself")
        yield name or "model", _in_sequence(model)
    elif chain is not None:
        if isinstance(chain, str) or not chain:
            raise TypeError(f"chain must be a sequence of names of submodules, got {chain!r}")
        yield name or "model", [found for each in chain for found in _flat(each, _submodule(model, each))]
    elif isinstance(model, PersistentLayer) or type(model) is nn.Sequential or has_one_weight(model):
        yield name or "model", list(_flat("", model))
    else:
        yield from _each_layer(model, name)


def _each_layer(model: nn.Module, name: str | None) -> Iterator[tuple[str, list[tuple[str, nn.Module]]]]:
    found: dict[str, tuple[str, nn.Module]] = {}
    for path, module in model.named_modules():
        if isinstance(module, PersistentLayer) or (has_one_weight(module) and not isinstance(module, nn.Linear)):
            place = clean_name(path)
            shown = _shown(place)
            identifier = re.sub(r"\W", "_", place or "model", flags=re.ASCII)
            identifier = identifier if name is None else f"{name}_{identifier}"
            identifier = f"layer_{identifier}" if identifier[:1].isdigit() else identifier
            if identifier in found:
                raise ValueError(
                    f"model has {found[identifier][0]} and {shown}, which would both be {identifier} in C: export "
                    "them one at a time with chain= and name="
                )
            _check_name(identifier)
            found[identifier] = shown, module
    if not found:
        raise ValueError(
            f"model must hold a layer that to_sparse() made, got a {type(model).__name__} with none; for layers as "
            "they are, give those that follow each other as a list"
        )
    for identifier, layer in found.items():
        yield identifier, [layer]


def _in_sequence(modules: Sequence[nn.Module]) -> list[tuple[str, nn.Module]]:
    if isinstance(modules, str) or not isinstance(modules, Sequence):
        raise TypeError(f"model must be an nn.Module or a sequence of them, got {type(modules).__name__}")
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(f"model must hold modules, got {type(module).__name__}")
    return [found for number, module in enumerate(modules) for found in _flat(str(number), module)]


def _flat(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield a module under a name for messages, or of an nn.Sequential what it runs."""
    if type(module) is nn.Sequential:
        for child_name, child in module.named_children():
            yield from _flat(f"{name}.{child_name}" if name else child_name, child)
    else:
        yield _shown(clean_name(name)), module


def _shown(place: str) -> str:
    """What messages call a module."""
    return repr(place) if place else "model"


def _submodule(model: nn.Module, name: str) -> nn.Module:
    modules = {clean_name(path): module for path, module in model.named_modules(remove_duplicate=False)}
    if name not in modules:
        raise ValueError(f"chain must name submodules of model, got {name!r}, which it does not have")
    return modules[name]


def _check_name(name: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {type(name).__name__}")
    if not re.fullmatch(r"[A-Za-z_]\w*", name, flags=re.ASCII) or name.lower().startswith("tsr_"):
        raise ValueError(f"name must be a C identifier that does not begin with tsr_, got {name!r}")


def _runtime_file(file: str) -> bytes:
    return (importlib.resources.files("triton_sparse_rnn.export") / "c" / file).read_bytes()


def _maker() -> str:
    return f"triton-sparse-rnn {importlib.metadata.version('triton-sparse-rnn')}"
