"""Where warnings point, and which layer they name."""

import warnings

import pytest
from torch import nn

from triton_sparse_rnn import PersistentGRU, PolynomialDecay, Pruner, SparseGRU, sparsify, to_sparse
from triton_sparse_rnn.nn.persistent_tools import PersistentTools


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"rnn": SparseGRU(16, 64)})


class Extended(nn.GRU):
    def reset(self): ...


def converted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return to_sparse(Model())


@pytest.mark.parametrize(
    ("call", "beginnings"),
    [
        (lambda: to_sparse(Model()), ["inner.rnn.weight_ih_l0 is 0% zeros", "inner.rnn.weight_hh_l0 is 0% zeros"]),
        (lambda: to_sparse(nn.GRU(16, 64)), ["weight_ih_l0 is", "weight_hh_l0 is"]),
        (lambda: SparseGRU(16, 64).to_sparse(), ["weight_ih_l0 is", "weight_hh_l0 is"]),
        (lambda: PersistentGRU.from_dense(nn.GRU(16, 64)), ["weight_ih_l0 is", "weight_hh_l0 is"]),
        (lambda: sparsify(nn.Sequential(nn.GRU(1, 1), Extended(1, 1))), ["sparsify left some layers"]),
        (
            lambda: Pruner(nn.RNN(2, 2), PolynomialDecay.for_training(9), pattern=(2, 2)),
            ["weight_ih_l0 will be", "weight_hh_l0 will be"],
        ),
        (lambda: nn.Sequential(converted()).train(), ["PersistentGRU is for inference: train() changes nothing"]),
    ],
    ids=["to_sparse", "to_sparse of a layer", "method", "from_dense", "sparsify", "Pruner", "train"],
)
def test_warnings_point_at_the_line_that_called(call, beginnings, monkeypatch):
    monkeypatch.setattr(PersistentTools, "_said_train_changes_nothing", False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    places = {(warning.filename, warning.lineno) for warning in caught}
    assert places == {(__file__, call.__code__.co_firstlineno)}
    assert len(caught) == len(beginnings)
    for warning, beginning in zip(caught, beginnings, strict=True):
        assert str(warning.message).startswith(beginning)


@pytest.mark.filterwarnings("ignore:.*little to skip")
def test_the_slow_layer_is_named():
    with pytest.warns(UserWarning, match=r"layer 'inner\.rnn' will run on backend 'reference'"):
        to_sparse(Model().double())
    with pytest.warns(UserWarning, match="the layer will run on backend 'reference'"):
        to_sparse(nn.GRU(16, 64).double())
