"""Models that other libraries build and train: pruned in their own trainer, converted, saved, loaded."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from triton_sparse_rnn import PersistentLSTM, load_sparse, save_sparse, sparsify, to_sparse

pytest.importorskip("lightning")

from triton_sparse_rnn.integrations.lightning import PrunerCallback

# What these libraries have to say about each other, and about data this small.
pytestmark = pytest.mark.filterwarnings(
    "ignore::Warning:(darts|pytorch_forecasting|lightning|pytorch_lightning|lightning_utilities|torch.utils|pandas)"
)
DENSE_INPUT = {"*.weight_ih_l0": None}  # of a series without covariates it is one column
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def wave():
    noise = np.random.default_rng(0).standard_normal(150)
    return (np.sin(np.arange(150) / 5) + 0.1 * noise).astype(np.float32)


@pytest.fixture(scope="module")
def darts():
    pytest.importorskip("darts.models")
    pytest.importorskip("darts.utils.serialization")
    return pytest.importorskip("darts")


def make_darts(darts, kind, callbacks=()):
    options: dict[str, Any] = {"n_epochs": 2, "batch_size": 32, "random_state": 0, "hidden_dim": 32}
    options["pl_trainer_kwargs"] = QUIET | {"callbacks": list(callbacks)}
    if kind == "block":
        return darts.models.BlockRNNModel(20, 4, model="LSTM", **options)
    return darts.models.RNNModel(20, model=kind, training_length=24, **options)


@pytest.mark.parametrize("kind", ["GRU", "LSTM", "RNN", "block"])
def test_darts_models_train_convert_save_load(darts, kind, tmp_path):
    series = darts.TimeSeries.from_values(wave())
    callback: Any = PrunerCallback(final_sparsity=0.8, targets=DENSE_INPUT)
    model = make_darts(darts, kind, [callback])
    model.fit(series)
    sparsify(model.model)
    assert callback.pruner.sparsity == pytest.approx(0.8, abs=0.1)
    expected = model.predict(6).values()

    model.save(str(tmp_path / "model.pt"), clean=True)  # darts' own file holds the plain weights
    loaded: Any = type(model).load(str(tmp_path / "model.pt"), pl_trainer_kwargs=QUIET)
    np.testing.assert_array_equal(loaded.predict(6, series=series).values(), expected)

    fast_network: Any = to_sparse(loaded.model.eval())
    loaded.model = fast_network
    assert fast_network.rnn.density < 0.3
    fast = loaded.predict(6, series=series).values()
    np.testing.assert_allclose(fast, expected, rtol=1e-4, atol=1e-6)

    save_sparse(loaded.model, tmp_path / "model.safetensors")
    again = type(model).load(str(tmp_path / "model.pt"), pl_trainer_kwargs=QUIET)
    again.model = load_sparse(again.model.eval(), tmp_path / "model.safetensors")
    np.testing.assert_array_equal(again.predict(6, series=series).values(), fast)


def test_a_darts_model_is_saved_with_its_callback_and_trained_on(darts, tmp_path):
    series = darts.TimeSeries.from_values(wave())
    model = make_darts(darts, "GRU", [PrunerCallback(final_sparsity=0.8, targets=DENSE_INPUT)])
    model.fit(series)
    expected = model.predict(4).values()
    model.save(str(tmp_path / "model.pt"))
    with darts.utils.serialization.safe_globals([PrunerCallback]):
        loaded = darts.models.RNNModel.load(str(tmp_path / "model.pt"))
    np.testing.assert_array_equal(loaded.predict(4).values(), expected)
    (callback,) = [each for each in loaded.trainer_params["callbacks"] if isinstance(each, PrunerCallback)]
    assert callback.pruner is None
    loaded.fit(series, epochs=3)
    assert callback.pruner is not None
    weight = loaded.model.rnn.weight_hh_l0
    assert not weight[~callback.pruner.masks["rnn.weight_hh_l0"]].any()


@pytest.fixture(scope="module")
def forecasting():
    return pytest.importorskip("pytorch_forecasting")


@pytest.fixture(scope="module")
def data(forecasting):
    pandas = pytest.importorskip("pandas")
    return forecasting.TimeSeriesDataSet(
        pandas.DataFrame({"value": wave(), "time": np.arange(150), "group": "a"}),
        time_idx="time",
        target="value",
        group_ids=["group"],
        min_encoder_length=5,
        max_encoder_length=20,
        max_prediction_length=4,
        time_varying_known_reals=["time"],
        time_varying_unknown_reals=["value"],
        target_normalizer=None,
    )


@pytest.fixture(scope="module")
def persistent_class(forecasting):
    """The example of docs/trainers.md."""
    dense = forecasting.models.nn.LSTM

    class PersistentFlexibleLSTM(PersistentLSTM):
        dense_class = dense
        init_hidden_state = dense.init_hidden_state
        handle_no_encoding = dense.handle_no_encoding
        repeat_interleave = dense.repeat_interleave

        def forward(self, x, hx=None, lengths=None, enforce_sorted=True):  # type: ignore[override]
            if lengths is None:
                return super().forward(x, hx)
            packed = pack_padded_sequence(x, lengths.cpu(), self.batch_first, enforce_sorted)
            y, hx = super().forward(packed, hx)
            return pad_packed_sequence(y, self.batch_first)[0], hx

    return PersistentFlexibleLSTM


def make_transformer(forecasting, data):
    options = {
        "hidden_size": 32,
        "attention_head_size": 1,
        "dropout": 0.0,
        "learning_rate": 0.01,
        "log_interval": 0,
    }
    return forecasting.TemporalFusionTransformer.from_dataset(data, **options).eval()


def test_pytorch_forecasting_has_layers_of_a_class_of_its_own(forecasting, data, persistent_class, tmp_path):
    callback: Any = PrunerCallback(final_sparsity=0.8)
    model = make_transformer(forecasting, data)
    trainer = pytest.importorskip("lightning.pytorch").Trainer(
        max_epochs=3, callbacks=[callback], enable_checkpointing=False, log_every_n_steps=1, **QUIET
    )
    trainer.fit(model, data.to_dataloader(train=True, batch_size=32, num_workers=0))
    assert callback.pruner.sparsity == pytest.approx(0.8, abs=0.05)
    assert len(callback.pruner.weights) == 4

    batches = data.to_dataloader(train=False, batch_size=32, num_workers=0)
    expected = model.predict(batches, trainer_kwargs=dict(QUIET))
    fast: Any = to_sparse(model.eval())
    assert type(fast.lstm_encoder) is type(fast.lstm_decoder) is persistent_class
    assert fast.lstm_encoder.density < 0.3
    predicted = fast.predict(batches, trainer_kwargs=dict(QUIET))
    torch.testing.assert_close(predicted, expected, rtol=1e-4, atol=1e-5)

    save_sparse(fast, tmp_path / "model.safetensors")
    loaded = load_sparse(make_transformer(forecasting, data), tmp_path / "model.safetensors")
    assert torch.equal(loaded.predict(batches, trainer_kwargs=dict(QUIET)), predicted)
