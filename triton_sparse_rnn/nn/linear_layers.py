"""Find the linear layers of a model, and those of them that are to be converted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn
from torch.nn import Conv1d, Linear  # bound here, so that a patched torch.nn.Linear may be another
from torch.nn.parameter import is_lazy

from triton_sparse_rnn.names import checked_globs, clean_name, name_matches
from triton_sparse_rnn.nn.persistent_tools import PersistentTools

if TYPE_CHECKING:
    from typing import TypeGuard

FilterFn: TypeAlias = Callable[[nn.Module, str], bool]
# Modules of torch.nn that read the weights of linear layers inside them, instead of calling these.
_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def is_linear(module: nn.Module) -> TypeGuard[Linear | Conv1d]:
    """Whether a module computes W x + b for each vector x: an nn.Linear, or an nn.Conv1d that sees one step at a time.

    >>> is_linear(nn.Conv1d(4, 8, 1)), is_linear(nn.Conv1d(4, 8, 3)), is_linear(nn.Conv1d(4, 8, 1, groups=2))
    (True, False, False)
    """
    if isinstance(module, Linear):
        return min(module.in_features, module.out_features) > 0 and not _is_lazy(module)
    if not isinstance(module, Conv1d) or _is_lazy(module):
        return False
    return (
        module.kernel_size == module.stride == (1,)
        and module.padding in ((0,), "valid", "same")
        and (module.groups == 1)
    )


def named_linear_layers(model: nn.Module) -> dict[str, Linear | Conv1d]:
    """Return every layer of a model that `is_linear`, by name; a shared one once, under the first of its names."""
    return {name: module for name, module in model.named_modules() if is_linear(module)}


def included_layers(model: nn.Module, include: Iterable[str]) -> tuple[set[str], list[str]]:
    """Return the names of linear layers whose weights globs match, and of other matrices that they match too.

    These are not those of recurrent layers, which are converted without being named.

    Raises:
        TypeError: `include` is no sequence of globs.
        ValueError: one of them matches no matrix of the model.
    """
    globs = checked_globs(include)
    linear, others, recurrent = {}, {}, set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        path = f"{prefix}." if prefix else ""
        if is_linear(module):
            linear[clean_name(f"{path}weight")] = module
        elif isinstance(module, PersistentTools):  # converted already
            recurrent |= {clean_name(path + name) for name in module.stored_weights() if "weight" in name}
        elif isinstance(module, nn.RNNBase):
            recurrent |= {clean_name(path + name) for name in module._flat_weights_names if "weight" in name}
        else:
            matrices = (name for name, one in module._parameters.items() if one is not None and one.dim() >= 2)
            others |= {clean_name(path + name): type(module).__name__ for name in matrices}
    for glob in globs:
        if not any(name_matches(name, glob) for name in (*linear, *others, *recurrent)):
            raise ValueError(f"include has {glob!r}, which matches no parameter of two dimensions or more")
    chosen = {id(module) for name, module in linear.items() if any(name_matches(name, glob) for glob in globs)}
    unfit = [
        f"'{name}' belongs to {kind}, and only weights of nn.Linear, and of nn.Conv1d with kernel size 1, can be stored"
        for name, kind in others.items()
        if any(name_matches(name, glob) for glob in globs)
    ]
    return {name for name, module in named_linear_layers(model).items() if id(module) in chosen}, unfit


def reader_of(model: nn.Module, name: str) -> str | None:
    """Return the class of what reads the weights of a linear layer by itself; None where it is called."""
    parts = name.split(".")
    parents = (model.get_submodule(".".join(parts[:end])) for end in range(len(parts)))
    return next((type(parent).__name__ for parent in parents if isinstance(parent, _READERS)), None)


def _is_lazy(module: nn.Module) -> bool:
    weight: Any = module._parameters.get("weight")
    return is_lazy(weight)
