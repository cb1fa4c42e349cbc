"""Names of modules and tensors, without what wrappers put into them, and modules without the wrappers."""

from __future__ import annotations

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


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside of wrappers of torch and Lightning Fabric; one of a user's is none, whatever it has."""
    kind = type(model).__module__
    if kind.startswith(_WRAPPING) and not kind.startswith("torch.nn.modules."):
        for name, module in model.named_children():
            if name in WRAPPERS:
                return unwrapped(module)
    return model
