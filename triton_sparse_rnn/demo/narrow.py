"""The trained model once more, with the weights of its layer stored in fewer bytes."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor

from triton_sparse_rnn.conversion import to_dense, to_sparse
from triton_sparse_rnn.demo.evaluation import check_rounding, check_same_outputs
from triton_sparse_rnn.demo.model import CharacterModel


@dataclasses.dataclass(frozen=True)
class Narrow:
    """A way to store the weights of the layer: the label of its row, its file and the arguments of `to_sparse`."""

    label: str
    file: str
    weight_dtype: torch.dtype
    activation_dtype: torch.dtype | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {"weight_dtype": self.weight_dtype, "activation_dtype": self.activation_dtype}


NARROW = {
    "float16_weights": Narrow("weights in float16", "model-float16.safetensors", torch.float16),
    "bfloat16_weights": Narrow("weights in bfloat16", "model-bfloat16.safetensors", torch.bfloat16),
    "int8_weights": Narrow("weights in int8", "model-int8.safetensors", torch.int8),
    "int8": Narrow("activations in int8 too", "model-int8-activations.safetensors", torch.int8, torch.int8),
}


def convert_narrow(trained: CharacterModel, ids: Tensor) -> dict[str, CharacterModel]:
    """Return the model in each way of NARROW, each one checked on ids [T, B].

    Rounding may make a difference, what computes with the rounded numbers may not: a model with rounded weights must
    say what nn.GRU says with the same ones. No nn.GRU rounds activations; there it is the same model in plain torch,
    backend "reference", that is compared.

    Raises:
        WrongResultError: a model says something else.
    """
    models = {}
    for name, narrow in NARROW.items():
        models[name] = model = cast(CharacterModel, to_sparse(trained, **narrow.options))
        rounded = to_dense(model)
        if narrow.activation_dtype is None:
            check_same_outputs(rounded, model, ids)
        else:
            check_rounding(rounded, to_sparse(trained, **narrow.options, backend="reference"), model, ids)
    return models
