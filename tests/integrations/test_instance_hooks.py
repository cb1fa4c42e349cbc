"""Models in the hands of Lightning Fabric and accelerate: their wrappers, and the forward they set on instances."""

from typing import Any

import pytest
import torch
from torch import nn

from triton_sparse_rnn import OneShot, PersistentGRU, Pruner, load_sparse, save_sparse, to_sparse

X = torch.linspace(-1, 1, 5 * 2 * 4).view(5, 2, 4)


class Model(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.rnn: Any = nn.GRU(4, 16)
        self.head = nn.Linear(16, 2)
        with torch.no_grad():
            self.rnn.weight_ih_l0[:, 1:] = 0
            self.rnn.weight_hh_l0[:, 1:] = 0

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def make_model(seed=0) -> Any:
    return Model(seed)


def test_fabric(tmp_path):
    fabric = pytest.importorskip("lightning.fabric")
    launched = fabric.Fabric(accelerator="cpu", devices=1)
    trained = make_model()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    wrapped, stepping = launched.setup(trained, optimizer)
    pruner = Pruner(wrapped, OneShot(sparsity=0.5, step=1), pattern=(16, 1), include=("*",))
    assert [weight.name for weight in pruner.weights] == ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "head.weight"]
    launched.backward(wrapped(X).sum())
    stepping.step()
    fast = to_sparse(make_model())
    save_sparse(to_sparse(launched.setup(make_model())), tmp_path / "file")
    for fresh in (make_model(1), launched.setup(make_model(1))):
        assert torch.equal(load_sparse(fresh, tmp_path / "file")(X), fast(X))


def test_accelerate(tmp_path):
    hooks = pytest.importorskip("accelerate.hooks")
    model = make_model()
    expected = model(X)
    hooks.add_hook_to_module(model.rnn, hooks.ModelHook())
    with pytest.raises(ValueError, match=r"has its own forward .*; accelerate\.hooks\.remove_hook_from_module"):
        to_sparse(model)
    hooks.remove_hook_from_module(model, recurse=True)
    hooks.add_hook_to_module(model, hooks.ModelHook())  # on the model it is copied with it
    fast: Any = to_sparse(model)
    assert type(fast.rnn) is PersistentGRU
    nn.init.zeros_(model.rnn.bias_hh_l0)
    torch.testing.assert_close(fast(X), expected)
    hooks.add_hook_to_module(fast.rnn, hooks.ModelHook())
    save_sparse(fast, tmp_path / "file")
    assert torch.equal(load_sparse(make_model(1), tmp_path / "file")(X), fast(X))
