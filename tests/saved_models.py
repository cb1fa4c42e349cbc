"""Models that are saved and loaded, files that somebody changed, and what a refused load must leave as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from triton_sparse_rnn import load_sparse, save_sparse, to_sparse
from triton_sparse_rnn.errors import SparseFileError
from triton_sparse_rnn.sparse import files


class Model(nn.Module):
    """Every kind of tensor a model may hold: tied, shared, integer, bool, 0-D, empty; and layers in several places."""

    def __init__(self, cell: Any = nn.GRU, hidden_size=6, layers=2, dtype=torch.float32, **options):
        super().__init__()
        self.embedding = nn.Embedding(9, 4, dtype=dtype)
        self.rnn = cell(4, hidden_size, layers, dtype=dtype, **options)
        self.stack = nn.ModuleList([nn.LSTM(hidden_size, 4, proj_size=3, dtype=dtype), nn.Identity()])
        self.rnn_again = self.rnn
        self.head = nn.Linear(4, 9, bias=False, dtype=dtype)
        self.head.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("empty", torch.empty(0, 2))
        self.register_buffer("narrow", torch.ones(2, dtype=torch.bfloat16))

    def forward(self, tokens):
        return self.stack[0](self.rnn(self.embedding(tokens))[0])[0]  # type: ignore[operator]


def make_model(seed=0, **options) -> Any:
    torch.manual_seed(seed)
    model = Model(**options).eval().requires_grad_(False)
    for layer in (model.rnn, model.stack[0]):
        for name, weight in layer.named_parameters():  # type: ignore[union-attr]
            if name.startswith(("weight_ih", "weight_hh")):
                weight[:, 1:] = 0
    return model


def prepare(path: Path, model: Any = None, **options) -> Any:
    sparse = to_sparse(make_model() if model is None else model, storage=(2, 1), **options)
    save_sparse(sparse, path)
    return sparse


def snapshot(model):
    modules = list(model.modules())
    tensors = [(tensor, tensor.detach().clone()) for tensor in model.state_dict(keep_vars=True).values()]
    return modules, tensors


def assert_untouched(model, before):
    modules, tensors = before
    assert [id(module) for module in model.modules()] == [id(module) for module in modules]
    for tensor, (same, value) in zip(model.state_dict(keep_vars=True).values(), tensors, strict=True):
        assert tensor is same
        assert torch.equal(tensor, value)


def assert_refused(path, message, model=None, error: type[Exception] = SparseFileError):
    model = make_model(seed=1) if model is None else model
    before = snapshot(model)
    with pytest.raises(error, match=message):
        load_sparse(model, path)
    assert_untouched(model, before)


def make_gru(seed=0, zeroed=("weight_ih_l0", "weight_hh_l0")) -> Any:
    torch.manual_seed(seed)
    gru = nn.GRU(4, 6).requires_grad_(False)
    for name in zeroed:
        getattr(gru, name)[:, 1:] = 0
    return gru


def forge(path, change_tensors, change_content=lambda content: None):
    """Rewrite a file with other tensors and description, and a digest that fits."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    description = json.loads(metadata["description"])
    change_tensors(tensors)
    change_content(description["content"]["modules"])
    metadata["description"] = json.dumps(description)
    metadata["sha256"] = files._digest(tensors, metadata["description"])
    save_file(tensors, path, metadata=metadata)
