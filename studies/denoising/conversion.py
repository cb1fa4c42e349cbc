"""The fine-tuned model as it is used: the GRU converted, and the linear layers where they were pruned too."""

from __future__ import annotations

import warnings

import torch

from studies.denoising.model import Denoiser
from studies.denoising.rows import LINEAR_WEIGHTS
from triton_sparse_rnn import to_sparse
from triton_sparse_rnn.nn.persistent_module import PersistentModule

UNCONVERTED = "unconverted"
WEIGHT_DTYPES = {"float32": None, "int8": torch.int8}  # that every model is converted to


def convert(model: Denoiser, *, linear_too: bool, weight_dtype: torch.dtype | None = None) -> Denoiser:
    """Return the model converted; the given one stays as it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*little to skip")  # the dense row is dense on purpose
        converted = to_sparse(model, include=LINEAR_WEIGHTS if linear_too else (), weight_dtype=weight_dtype)
    assert isinstance(converted, Denoiser)
    return converted.eval()


def stored_bytes(model: Denoiser) -> int:
    """Return the bytes of all weights, biases and indices, converted or not."""
    ours = [module for module in model.modules() if isinstance(module, PersistentModule)]
    inside = {id(tensor) for module in ours for tensor in module.buffers()}
    rest = [tensor for tensor in [*model.parameters(), *model.buffers()] if id(tensor) not in inside]
    return sum(module.nbytes for module in ours) + sum(tensor.nbytes for tensor in rest)
