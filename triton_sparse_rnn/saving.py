"""Save a converted model in one file, and load it into a freshly built dense one."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import GRU, LSTM, RNN  # bound here, so that a patched torch.nn.GRU may be a SparseGRU

from triton_sparse_rnn.errors import SparseFileError
from triton_sparse_rnn.names import clean_name
from triton_sparse_rnn.nn.convertible import why_not_converted
from triton_sparse_rnn.nn.instance_state import become, stand_in
from triton_sparse_rnn.nn.linear_layers import is_linear
from triton_sparse_rnn.nn.persistent_module import PERSISTENT_CLASSES, PersistentModule, persistent_class, shown_name
from triton_sparse_rnn.nn.state_names import layers_by_prefix, names_in_file, saved_tensors
from triton_sparse_rnn.nn.storage import buffer_names, from_buffers
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.files import read_file, write_file
from triton_sparse_rnn.sparse.linear_config import config_of

ModelT = TypeVar("ModelT", bound=nn.Module)

_ACTIVATION_DTYPES = {None: None, "int8": torch.int8}


def save_sparse(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model that `to_sparse` made to one safetensors file.

    It holds the stored blocks of the persistent modules, every other tensor of model.state_dict() unchanged, a
    description of the blocks and a SHA-256 of it all. The same model gives the same bytes. Names are those of the
    state_dict, without what torch.compile, DistributedDataParallel, checkpoint wrappers, Fabric and the like put in, so
    a wrapped model has the same file as the model.

    A file that was there before is replaced in one go and keeps its permissions; a symbolic link is followed. When this
    returns, the file would survive a power cut; if it raises or is interrupted, an old file is as it was.

    Raises:
        TypeError: `model` is not a module, or its state_dict holds something other than tensors.
        ValueError: it has no persistent module, one whose tensors a hook keeps out of the state_dict or whose indices
            are wrong, or a tensor whose layout or dtype safetensors cannot hold.
        OSError: the file cannot be written, for example as the disk is full.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    persistent = {module: name for name, module in model.named_modules() if isinstance(module, PersistentModule)}
    if not persistent:
        raise ValueError(
            f"model must hold a module that to_sparse() made, got a {type(model).__name__} with none; "
            "save a dense model with safetensors.torch.save_model or torch.save"
        )
    state = model.state_dict(keep_vars=True)
    if others := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise TypeError(f"model.state_dict() must hold tensors only, got something else at {', '.join(others)}")
    layers, missing = layers_by_prefix(model, state, persistent)
    if missing:
        raise ValueError(
            f"model.state_dict() must hold the tensors of {', '.join(repr(persistent[layer]) for layer in missing)} "
            f"under names that end as in the layer itself, such as {next(iter(saved_tensors(missing[0])))}; a "
            "state_dict hook replaces or renames them: remove it to save"
        )
    names = names_in_file(state, layers)
    described = {}
    for prefix, layer in layers.items():
        name = _name_in_file(prefix, layer, names)
        described[name] = _describe(name, layer)
    write_file(path, {names[key]: value for key, value in state.items()}, {"modules": described})


def load_sparse(model: ModelT, path: str | os.PathLike[str]) -> ModelT:
    """Load a file of `save_sparse` into a freshly built dense model, in place.

    The recurrent and linear layers that were saved sparse become persistent modules; each stays the same object, so
    hooks, lists and closures that refer to it go on with it (but for one whose class has further bases, which Python
    cannot change: a new module is put in its places in the model). All other tensors are copied into
    the tensors of the model, as load_state_dict(strict=True) does. Either all of it happens or none. The model may be
    wrapped where the saved one was not, and the other way round.

    Args:
        model: of the architecture and dtype that were saved, with nn or Sparse modules, on its final device.
        path: the file.
    Returns:
        `model`, or what was put in its place.
    Raises:
        SparseFileError: the file is truncated, damaged or foreign, or holds another architecture.
        TypeError, ValueError: `model` is not a module, is on the meta device, or has a layer that would lose what its
            class or the layer itself adds, as in `to_sparse`.
        BackendUnavailableError: a layer of `model` was converted already, for a backend that cannot run these weights.
        OSError: the file cannot be read at all.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    state = model.state_dict(keep_vars=True)
    if meta := [name for name, value in state.items() if isinstance(value, Tensor) and value.is_meta]:
        raise ValueError(f"model has '{meta[0]}' on the meta device; build it on its final device first")
    tensors, description = read_file(path)
    convertible = [module for module in model.modules() if _new_class(module) is not None]
    by_prefix, missing = layers_by_prefix(model, state, convertible)
    names = names_in_file(state, by_prefix)
    layers = {_name_in_file(prefix, layer, names): (layer, prefix) for prefix, layer in by_prefix.items()}
    built: dict[nn.Module, PersistentModule] = {}
    wanted = {names[key]: value for key, value in state.items()}
    own: set[str] = set()  # keys of the weights that are replaced
    try:
        for name, described in description["modules"].items():
            layer, prefix = layers.get(name) or _raise_for_no_layer(path, name, described, model, missing)
            _check_same_sizes(path, name, layer, described)
            if layer not in built:  # a shared layer is saved under all of its names
                built[layer] = _build(path, name, layer, described, tensors)
            replaced = [prefix + weight for weight in saved_tensors(layer)]
            replaced += [key for key in state if key.startswith(f"{prefix}parametrizations.")]
            for key in replaced:
                del wanted[names[key]]
            wanted |= {f"{_prefix(name)}{weight}": tensor for weight, tensor in saved_tensors(built[layer]).items()}
            own.update(replaced)
        _check_same_tensors(path, tensors, wanted)
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise SparseFileError(f"{path} describes its tensors wrongly ({error!r}); nothing was loaded") from error
    _check_convertible(model, built)
    return _load(model, state, {key: tensors[names[key]] for key in state if key not in own}, built)  # type: ignore[return-value]


def _load(
    model: nn.Module, state: Mapping[str, Any], rest: Mapping[str, Tensor], built: Mapping[nn.Module, PersistentModule]
) -> nn.Module:
    """Copy tensors into the model and convert its layers, all of it or nothing; returns the model.

    Args:
        model: as it was.
        state: model.state_dict(keep_vars=True).
        rest: what is to be loaded under keys of `state`; the others keep their values.
        built: what each layer becomes.
    """
    before = {key: state[key].detach().clone() for key in rest}
    undo, loaded = [], model
    try:
        result = model.load_state_dict({**state, **rest}, strict=False)
        if getattr(result, "missing_keys", None) or getattr(result, "unexpected_keys", None):
            _copy_by_identity(model, state, rest)
        for layer, new in built.items():
            try:
                undo.append(become(layer, new))
            except TypeError:
                undo.append(stand_in(model, layer, new))
                loaded = new if layer is model else loaded
    except Exception:
        for restore in undo:
            restore()
        with torch.no_grad():
            for key, tensor in before.items():
                state[key].copy_(tensor)
        raise
    return loaded


def _copy_by_identity(model: nn.Module, state: Mapping[str, Any], rest: Mapping[str, Tensor]) -> None:
    """Load into a model whose state_dict hook renames, without a hook of load_state_dict that takes it back."""
    held = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    if lost := [key for key in rest if id(state[key]) not in held]:
        raise ValueError(
            f"model.load_state_dict() must take what model.state_dict() gives, but not so {', '.join(lost)}: a "
            "state_dict hook renames or replaces them; register a load_state_dict pre-hook that takes it back"
        )
    with torch.no_grad():
        for key, tensor in rest.items():
            state[key].copy_(tensor)


def _name_in_file(prefix: str, layer: nn.Module, names: Mapping[str, str]) -> str:
    """The name of a layer in a file, as its tensors have it in front of their own."""
    weight = next(iter(saved_tensors(layer)))
    return names[prefix + weight].removesuffix(weight).removesuffix(".")


def _raise_for_no_layer(
    path: object, name: str, described: dict[str, Any], model: nn.Module, missing: list[nn.Module]
) -> NoReturn:
    """Say what is there instead of a layer that the file holds."""
    places = [module for place, module in model.named_modules(remove_duplicate=False) if clean_name(place) == name]
    if any(module in missing for module in places):
        raise ValueError(
            f"model.state_dict() must hold the weights of '{name}' themselves, to be loaded: a state_dict hook "
            "replaces or renames them; remove it to load"
        )
    if places:  # wrappers, and in them what is of another class
        _check_same_sizes(path, name, places[-1], described)
    raise SparseFileError(f"{path} holds a {described['class']} '{name}', which the model does not have")


def _check_convertible(model: nn.Module, layers: Collection[nn.Module]) -> None:
    for name, layer in model.named_modules(remove_duplicate=False):
        if layer not in layers:
            continue
        if name.rpartition(".")[2] == "_orig_mod" or layer._compiled_call_impl is not None:
            raise ValueError(
                f"model holds torch.compile(...) right around {name or 'the layer'}; load first, then compile"
            )
        if not isinstance(layer, PersistentModule):
            reason, way_out = why_not_converted(layer)
            if reason:
                raise ValueError(f"model has '{clean_name(name)}', {reason}; {way_out}. Nothing was loaded.")


def _prefix(name: str) -> str:
    """What stands before the names of the tensors of a module; nothing for the model itself."""
    return f"{name}." if name else ""


def _describe(path: str, module: PersistentModule) -> dict[str, Any]:
    for name, weight in module.stored_weights().items():
        try:
            if isinstance(weight, BlockMatrix):
                weight.check()
        except ValueError as error:  # somebody has written into its indices
            raise ValueError(
                f"model has stored parts of {_prefix(path)}{name} that do not fit together: {error}"
            ) from error
    return {
        "class": type(module).__name__,
        "dtype": _dtype_name(module.dtype),
        "activation_dtype": None if module.activation_dtype is None else _dtype_name(module.activation_dtype),
        "config": config_of(module).sizes(),
    }


def _check_same_sizes(path: object, name: str, layer: nn.Module, described: dict[str, Any]) -> None:
    new_class = _new_class(layer)
    if new_class is None or new_class.__name__ != described["class"]:
        dense_classes = [dense for dense, cls in PERSISTENT_CLASSES.items() if cls.__name__ == described["class"]]
        advice = f"build the model with {shown_name(dense_classes[0])} there" if dense_classes else "import that class"
        raise SparseFileError(
            f"{path} holds a {described['class']} '{name}', where the model has a {type(layer).__name__}; {advice}"
        )
    saved, wanted = described["config"], config_of(layer).sizes()
    if saved.keys() != wanted.keys():
        raise KeyError(f"config of {[*saved]}")
    for size, value in wanted.items():
        if saved[size] != value:
            raise SparseFileError(f"{path} holds '{name}' with {size}={saved[size]}, the model's has {value}")
    dtype = _dtype_name(_dtype(layer))
    if dtype != described["dtype"]:
        raise SparseFileError(
            f"{path} holds '{name}' in {described['dtype']}, the model's is in {dtype}; convert the model first, with "
            f".to(torch.{described['dtype']})"
        )


def _new_class(layer: nn.Module) -> type[PersistentModule] | None:
    """What a layer becomes when it is loaded; None for what is no recurrent and no linear layer."""
    if isinstance(layer, PersistentModule):
        return type(layer)
    return persistent_class(layer) if isinstance(layer, (RNN, GRU, LSTM)) or is_linear(layer) else None


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(layer: Any) -> torch.dtype:
    if isinstance(layer, PersistentModule):
        return layer.dtype
    return getattr(layer, config_of(layer).weight_names()[0]).dtype


def _build(
    path: object, name: str, layer: Any, described: dict[str, Any], tensors: Mapping[str, Tensor]
) -> PersistentModule:
    # What computes is the machine's affair and stays as the layer has it; what is computed comes from the file.
    kept = ("backend", "num_threads") if isinstance(layer, PersistentModule) else ()
    options: dict[str, Any] = {option: getattr(layer, option) for option in kept}
    options["activation_dtype"] = _ACTIVATION_DTYPES[described["activation_dtype"]]
    try:
        new_class: Any = _new_class(layer)
        new = new_class(config_of(layer), _read_weights(_prefix(name), layer, tensors), dtype=_dtype(layer), **options)
    except ValueError as error:
        raise SparseFileError(f"{path} holds '{name}' with weights that do not fit together: {error}") from error
    new.training = layer.training  # train() would say that it changes nothing
    return new


def _read_weights(prefix: str, layer: Any, tensors: Mapping[str, Tensor]) -> dict[str, BlockMatrix | Tensor]:
    """Return the weights of a layer, checked to be of its sizes before anything computes with them."""
    config, dtype, device = config_of(layer), _dtype(layer), next(iter(saved_tensors(layer).values())).device
    held = {name: tensors[prefix + name].to(device) for name in buffer_names(config) if prefix + name in tensors}
    weights = {name: from_buffers(config, name, held) for name in config.weight_names()}
    for name, weight in weights.items():
        if isinstance(weight, BlockMatrix):
            weight.check()
        elif (weight.shape, weight.dtype) != (config.weight_shape(name), dtype):
            raise ValueError(f"{name} is {weight.dtype} of shape {tuple(weight.shape)}")
    return weights


def _check_same_tensors(path: object, saved: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> None:
    missing, unexpected = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    problems = [f"without {', '.join(missing)}"] if missing else []
    problems += [f"with {', '.join(unexpected)}, which the model does not have"] if unexpected else []
    problems += [
        f"with {name} of shape {tuple(tensor.shape)}, the model's has {tuple(wanted[name].shape)}"
        for name, tensor in saved.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    problems += [
        f"with {name} in {tensor.dtype}, the model's is in {wanted[name].dtype}"
        for name, tensor in saved.items()
        if name in wanted and tensor.dtype != wanted[name].dtype
    ]
    if not problems:
        tied: dict[Any, str] = {}
        for name, tensor in wanted.items():
            same = tied.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype), name)
            if saved[same] is not saved[name] and not torch.equal(saved[same], saved[name]):
                problems.append(f"with different {same} and {name}, which are one tensor in the model")
    if problems:
        raise SparseFileError(f"{path} holds another model: {'; '.join(problems)}. Nothing was loaded.")
