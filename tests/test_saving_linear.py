"""Models with converted linear layers are saved and loaded as those with recurrent ones are."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from triton_sparse_rnn import (
    PersistentConv1d,
    PersistentLinear,
    Picks,
    SparseFileError,
    load_sparse,
    save_sparse,
    to_sparse,
)

SIZE = 48


def build(bias: bool = True, out: int = SIZE) -> nn.Sequential:
    layers = nn.GRU(SIZE, SIZE), nn.Linear(SIZE, out, bias=bias), nn.Conv1d(SIZE, SIZE, 1), nn.Linear(SIZE, 3)
    return nn.Sequential(*layers).eval()


def pruned() -> nn.Sequential:
    torch.manual_seed(0)
    model = build()
    for parameter in [*model[:3].parameters()]:
        if parameter.dim() > 1:
            parameter.data.masked_fill_(torch.rand(parameter.shape) < 0.9, 0)
    return model


def convert(**options) -> nn.Sequential:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*little to skip")  # some are stored in blocks on purpose
        return to_sparse(pruned(), include=("1.weight", "2.weight"), **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"storage": Picks(16, 64, 4), "weight_dtype": torch.int8, "activation_dtype": torch.int8},
        {"storage": (16, 1)},
    ],
    ids=str,
)
def test_what_is_saved_is_loaded(tmp_path, options):
    fast, fresh = convert(**options), build()
    save_sparse(fast, tmp_path / "model.safetensors")
    linear, head = fresh[1], fresh[3]
    loaded = load_sparse(fresh, tmp_path / "model.safetensors")
    assert loaded[1] is linear  # the same object, of another class
    assert type(linear) is PersistentLinear
    assert type(loaded[2]) is PersistentConv1d
    assert loaded[3] is head
    assert type(head) is nn.Linear
    assert loaded.state_dict().keys() == fast.state_dict().keys()
    for name, tensor in fast.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    for i, x in ((1, torch.randn(2, SIZE)), (2, torch.randn(2, SIZE, 3))):
        assert torch.equal(loaded[i](x), fast[i](x))
        assert loaded[i].activation_dtype == options.get("activation_dtype")
    again = load_sparse(convert(**options), tmp_path / "model.safetensors")
    assert torch.equal(again[1](torch.ones(SIZE)), fast[1](torch.ones(SIZE)))


def test_a_layer_by_itself_is_saved(tmp_path):
    fast = to_sparse(pruned()[1])
    save_sparse(fast, tmp_path / "layer")
    loaded = load_sparse(nn.Linear(SIZE, SIZE), tmp_path / "layer")
    x = torch.randn(2, SIZE)
    assert torch.equal(loaded(x), fast(x))


def test_a_tied_weight_stays_with_the_others(tmp_path):
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Embedding(SIZE, SIZE), nn.Linear(SIZE, SIZE, bias=False))
        model[1].weight = model[0].weight
        return model

    model: Any = tied()
    model[0].weight.data.masked_fill_(torch.rand(SIZE, SIZE) < 0.9, 0)
    fast = to_sparse(model, include=("1.weight",))
    save_sparse(fast, tmp_path / "model")
    words = torch.arange(5)
    assert torch.equal(load_sparse(tied(), tmp_path / "model")(words), fast(words))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (build(bias=False), "holds '1' with bias=True, the model's has False"),
        (build(out=SIZE + 1), "holds '1' with out_features=48, the model's has 49"),
        (
            nn.Sequential(nn.GRU(SIZE, SIZE), nn.GRU(SIZE, SIZE)),
            "holds a PersistentLinear '1', where the model has a GRU",
        ),
        (nn.Sequential(nn.GRU(SIZE, SIZE), nn.ReLU()), "holds a PersistentLinear '1', where the model has a ReLU"),
        (build().double(), "in float32, the model's is in float64"),
    ],
)
def test_other_models_are_refused(tmp_path, model, message):
    save_sparse(convert(), tmp_path / "model")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(SparseFileError, match=message):
        load_sparse(model, tmp_path / "model")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_wrong_indices_are_not_saved(tmp_path):
    fast: Any = convert(storage=(16, 1))
    fast[1].weight_columns.fill_(1000)
    with pytest.raises(ValueError, match=r"stored parts of 1\.weight that do not fit together"):
        save_sparse(fast, tmp_path / "model")
