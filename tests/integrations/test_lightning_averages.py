"""Callbacks of Lightning that average weights, beside the pruner's, in either order."""

import pytest
import torch
from torch import nn

from triton_sparse_rnn import OneShot, PolynomialDecay, to_sparse

pytest.importorskip("lightning")

from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning_training import STEPS, fit, loader, make_trainer, masked, model_class, pruner_callback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # data this small needs none
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.* is deprecated"),  # Lightning's own call of torch
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists"),  # the one that is resumed
    pytest.mark.filterwarnings("ignore:.*scheduler.step.*before.*optimizer.step"),  # StochasticWeightAveraging's order
]
AVERAGES = {
    "WeightAveraging": {},
    "EMAWeightAveraging": {"decay": 0.9},
    "EMAWeightAveraging of epochs": {"decay": 0.5, "update_every_n_steps": 0, "update_starting_at_epoch": 1},
    "StochasticWeightAveraging": {"swa_lrs": 0.01, "swa_epoch_start": 2},
    "StochasticWeightAveraging of infinite training": {"swa_lrs": 0.01, "swa_epoch_start": 1},
}


def averaging(kind):
    name = kind.split()[0]
    if not hasattr(callbacks, name):
        pytest.skip(f"this Lightning has no {name}")
    return getattr(callbacks, name)(**AVERAGES[kind])


class Looks(Callback):
    """At what is evaluated, and at the model when everything is over."""

    def __init__(self, pruner):
        self.pruner, self.zeros = pruner, []

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if not trainer.sanity_checking:
            self.zeros.append(masked(self.pruner, pl_module))


@pytest.mark.parametrize("first", ["pruner", "average"])
@pytest.mark.parametrize("kind", AVERAGES)
def test_the_averaged_model_is_pruned_and_so_is_what_is_saved(kind, first, tmp_path):
    callback, average = pruner_callback(schedule=OneShot(sparsity=0.8, step=3 * STEPS - 2)), averaging(kind)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=STEPS, save_top_k=-1, save_last=True)
    looks = Looks(callback)
    order = (callback, average) if first == "pruner" else (average, callback)
    epochs = 4
    if "infinite" in kind:
        stop = Stop(epochs)
        model, _ = fit(*order, looks, saving, stop, max_epochs=-1)
    else:
        model, _ = fit(*order, looks, saving, max_epochs=epochs)
    assert callback.pruner.step_count == epochs * STEPS
    assert masked(callback, model)
    own = {name: parameter.detach() for name, parameter in average._average_model.named_parameters()}
    weights = {name.removeprefix("module."): parameter for name, parameter in own.items()}
    assert all(not weights[name][~mask].any() for name, mask in callback.pruner.masks.items())
    assert looks.zeros[-1]
    fast = to_sparse(model.eval(), storage=(4, 1))
    assert fast.rnn.density == pytest.approx(0.2, abs=0.03)
    for path in tmp_path.glob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        if checkpoint["global_step"] >= 3 * STEPS - 2:
            states = [checkpoint["state_dict"], checkpoint.get("current_model_state")]
            key = next(key for key in checkpoint["callbacks"] if key.startswith(kind.split()[0]))
            states.append(checkpoint["callbacks"][key].get("average_model_state"))
            for state in filter(None, states):
                assert all(not state[name][~mask].any() for name, mask in callback.pruner.masks.items())
                assert state["rnn.weight_hh_l0"].any()


class Stop(Callback):
    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch == self.epochs - 1


@pytest.mark.parametrize("first", ["pruner", "average"])
def test_a_resumed_training_averages_pruned_weights_from_its_first_step(first, tmp_path):
    def order():
        callback, average = pruner_callback(), averaging("EMAWeightAveraging")
        return (callback, average) if first == "pruner" else (average, callback)

    whole = order()
    expected, _ = fit(*whole, ModelCheckpoint(tmp_path, every_n_train_steps=STEPS, save_top_k=-1), max_epochs=3)
    resumed = order()
    model, path = model_class()(), next(tmp_path.glob(f"*step={2 * STEPS}.ckpt"))
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=STEPS, save_top_k=-1)
    make_trainer(*resumed, saving, max_epochs=3).fit(model, loader(), loader(), ckpt_path=path)
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)
    assert masked(resumed[first != "pruner"], model)


def test_an_epoch_for_batch_normalization_is_no_part_of_the_schedule():
    model = model_class()()
    model.norm = nn.BatchNorm1d(5)
    forward = model.forward
    model.forward = lambda x: forward(model.norm(x))
    callback = pruner_callback()
    fit(callback, averaging("StochasticWeightAveraging"), model=model, max_epochs=3)
    assert callback.pruner.step_count - 3 * STEPS in (0, 1)  # Lightning steps once in the epoch that it adds
    assert callback.pruner.weights[0].schedules[0] == PolynomialDecay.for_training(3 * STEPS, final_sparsity=0.8)
    assert callback.pruner.finished
    assert masked(callback, model)


class OwnAverage(Callback):
    """Puts an average of its own into the model when training ends."""

    def on_train_start(self, trainer, pl_module):
        self.kept = [parameter.detach().clone() for parameter in pl_module.parameters()]

    def on_train_end(self, trainer, pl_module):
        for kept, parameter in zip(self.kept, pl_module.parameters(), strict=True):
            parameter.data.copy_(kept)


@pytest.mark.parametrize("first", ["pruner", "average"])
def test_an_average_of_ones_own_is_found_out_when_training_ends(first):
    callback = pruner_callback()
    order = (callback, OwnAverage()) if first == "pruner" else (OwnAverage(), callback)
    with pytest.warns(UserWarning, match=r"were written to since the step of Adam .*apply_masks\(average\)"):
        model, _ = fit(*order)
    assert masked(callback, model)
