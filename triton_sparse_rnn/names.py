"""Names of modules and tensors, without what wrappers put into them, globs of names, and modules without wrappers."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

# The attributes under which wrappers keep the module that they wrap.
WRAPPERS = {
    "_orig_mod",  # torch.compile
    "module",  # DistributedDataParallel, DataParallel, AveragedModel
    "_checkpoint_wrapped_module",  # checkpoint_wrapper, offload_wrapper
    "_fsdp_wrapped_module",  # FullyShardedDataParallel; fully_shard wraps nothing
    "_forward_module",  # Lightning Fabric
    "_original_module",
}
_WRAPPING = ("torch.", "lightning.fabric.", "lightning_fabric.")  # where their classes are


def clean_name(path: str) -> str:
    """Leave out of the name of a module or tensor what wrappers put in.

    >>> clean_name("module._orig_mod.rnn.weight_hh_l0")
    'rnn.weight_hh_l0'
    """
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


def clean_names(paths: Iterable[str]) -> dict[str, str]:
    """Return the clean name of each path, or every path as it is where two of them would be called the same.

    >>> clean_names(["module.rnn.weight", "module.head.weight"])
    {'module.rnn.weight': 'rnn.weight', 'module.head.weight': 'head.weight'}
    >>> clean_names(["module.weight", "weight"])
    {'module.weight': 'module.weight', 'weight': 'weight'}
    """
    names = {path: clean_name(path) for path in paths}
    return names if len(set(names.values())) == len(names) else {path: path for path in names}


def name_matches(name: str, pattern: str) -> bool:
    """Whether a glob matches a name; "*.weight_hh_l0" also matches the bare "weight_hh_l0" of a layer on its own.

    >>> name_matches("rnn.weight_hh_l0", "*.weight_hh*"), name_matches("weight_hh_l0", "*.weight_hh*")
    (True, True)
    """
    pattern = clean_name(pattern)
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(f".{name}", pattern)


def checked_globs(include: Iterable[str]) -> tuple[str, ...]:
    """Return the globs of an argument `include`, or raise TypeError unless it is a sequence of texts."""
    globs = tuple(include) if isinstance(include, Iterable) else (include,)
    if isinstance(include, str) or not all(isinstance(glob, str) for glob in globs):
        raise TypeError(f"include must be a sequence of globs, such as ('decoder.weight',), got {include!r}")
    return globs


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside of wrappers of torch and Lightning Fabric; one of a user's is none, whatever it has."""
    kind = type(model).__module__
    if kind.startswith(_WRAPPING) and not kind.startswith("torch.nn.modules."):
        for name, module in model.named_children():
            if name in WRAPPERS:
                return unwrapped(module)
    return model
