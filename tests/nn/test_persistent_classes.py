from typing import Any

import pytest
import torch
from torch import nn

from triton_sparse_rnn import PersistentGRU, SparseGRU, load_sparse, save_sparse, to_dense, to_sparse
from triton_sparse_rnn.errors import SparseFileError
from triton_sparse_rnn.nn.persistent_module import persistent_class

little_to_skip = pytest.mark.filterwarnings("ignore:.*little to skip")  # nothing is pruned in these models


class Doubling(nn.GRU):
    def forward(self, x):  # type: ignore[override]
        y, h = super().forward(x)
        return y + y, self.last(h)

    def last(self, h):
        return h[-1]


class PersistentDoubling(PersistentGRU):
    dense_class = Doubling
    last = Doubling.last

    def forward(self, x):  # type: ignore[override]
        y, h = super().forward(x)
        return y + y, self.last(h)


class Tripling(Doubling):
    def forward(self, x):  # type: ignore[override]
        y, h = super().forward(x)
        return 1.5 * y, h


def test_the_nearest_class_is_taken():
    assert persistent_class(SparseGRU(2, 3)) is PersistentGRU
    assert persistent_class(Doubling(2, 3)) is PersistentDoubling
    assert persistent_class(Tripling(2, 3)) is PersistentDoubling


@little_to_skip
def test_a_model_there_and_back(tmp_path):
    model = nn.Sequential(Doubling(4, 8)).eval()
    x = torch.randn(5, 2, 4)
    fast: Any = to_sparse(model)
    assert type(fast[0]) is PersistentDoubling
    for ours, theirs in zip(fast(x), model(x), strict=True):
        torch.testing.assert_close(ours, theirs)
    back: Any = to_dense(fast)
    assert type(back[0]) is Doubling
    assert all(map(torch.equal, back.state_dict().values(), model.state_dict().values()))
    save_sparse(fast, tmp_path / "file")
    loaded = load_sparse(nn.Sequential(Doubling(4, 8)), tmp_path / "file")
    assert type(loaded[0]) is PersistentDoubling
    assert torch.equal(loaded(x)[0], fast(x)[0])


@little_to_skip
def test_a_file_is_not_loaded_into_a_layer_of_another_class(tmp_path):
    save_sparse(to_sparse(nn.Sequential(Doubling(4, 8))), tmp_path / "file")
    message = "holds a PersistentDoubling '0', where the model has a GRU; build the model with Doubling there"
    with pytest.raises(SparseFileError, match=message):
        load_sparse(nn.Sequential(nn.GRU(4, 8)), tmp_path / "file")


def test_messages_call_a_class_by_its_name():
    with pytest.raises(TypeError, match=r"PersistentDoubling\.from_dense takes a layer of class Doubling, got GRU"):
        PersistentDoubling.from_dense(nn.GRU(4, 8))
    with pytest.raises(TypeError, match=r"PersistentGRU\.from_dense takes a layer of class nn\.GRU, got LSTM"):
        PersistentGRU.from_dense(nn.LSTM(4, 8))


def test_other_bases_of_a_class_get_their_options():
    class Named:
        def __init_subclass__(cls, *, label, **options):
            super().__init_subclass__(**options)
            cls.label = label

    class PersistentNamed(PersistentGRU, Named, label="a name"):
        pass

    assert PersistentNamed.label == "a name"  # pyright: ignore[reportAttributeAccessIssue]


def test_what_a_further_subclass_would_lose_is_said():
    with pytest.raises(ValueError, match="'0' is a Tripling, which would lose forward"):
        to_sparse(nn.Sequential(Tripling(4, 8)))
