from typing import Any

import pytest
import torch

from triton_sparse_rnn import PersistentGRU, SparseGRU
from triton_sparse_rnn.demo import narrow as demo_narrow
from triton_sparse_rnn.demo.evaluation import WrongResultError
from triton_sparse_rnn.demo.model import CharacterModel, build_model
from triton_sparse_rnn.demo.narrow import NARROW, convert_narrow


@pytest.fixture
def trained() -> CharacterModel:
    model = build_model(SparseGRU, 9, 23, 20, seed=1).eval()
    for weight in (model.rnn.weight_ih_l0, model.rnn.weight_hh_l0):
        weight.data[:, torch.arange(weight.shape[1]) % 12 > 3] = 0  # less than half in blocks of each size too
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(9, (30, 3), generator=torch.Generator().manual_seed(0))


def test_each_is_stored_as_its_label_says_and_near_the_trained_model(trained: CharacterModel, ids: torch.Tensor):
    models = convert_narrow(trained, ids)
    assert list(models) == list(NARROW)
    with torch.inference_mode():
        expected = trained(ids)[0]
        errors = {name: float((model(ids)[0] - expected).abs().max()) for name, model in models.items()}
    assert 0 < errors["float16_weights"] < errors["bfloat16_weights"] < 0.01
    assert 0 < errors["int8_weights"] < errors["int8"] < 0.05
    for name, model in models.items():
        dtype = str(model.rnn.weight_hh_l0_values.dtype).removeprefix("torch.")
        assert NARROW[name].label.startswith((f"weights in {dtype}", f"activations in {dtype}"))
        assert (model.rnn.activation_dtype is not None) == ("activations" in NARROW[name].label)
    assert len({one.file for one in NARROW.values()}) == len(NARROW)


class WrongGRU(PersistentGRU):
    def forward(self, input: Any, hx: Any = None) -> Any:
        y, h = super().forward(input, hx)
        return y * 0.9, h


@pytest.mark.parametrize("name", NARROW)
def test_a_wrong_model_is_not_returned(
    trained: CharacterModel, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch, name: str
):
    convert = demo_narrow.to_sparse

    def convert_wrongly(model: CharacterModel, backend: str | None = None, **options: Any) -> Any:
        """What is stored is right, and so are to_dense and the reference; what the kernel makes of it is not."""
        converted: Any = convert(model, backend=backend, **options)
        if options == NARROW[name].options and backend is None:
            converted.rnn.__class__ = WrongGRU
        return converted

    monkeypatch.setattr(demo_narrow, "to_sparse", convert_wrongly)
    with pytest.raises(WrongResultError):
        convert_narrow(trained, ids)
