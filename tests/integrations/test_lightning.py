import copy
import inspect
import pickle
from typing import Any

import pytest
import torch

from triton_sparse_rnn import OneShot, PolynomialDecay, Pruner, ThresholdRamp, load_sparse, save_sparse, to_sparse

pytest.importorskip("lightning")

from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning_training import STEPS, fit, loader, make_trainer, masked, model_class, pruner_callback

from triton_sparse_rnn.integrations.lightning import PrunerCallback
from triton_sparse_rnn.integrations.pruned_training import PrunerOptions

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # data this small needs none
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.* is deprecated"),  # Lightning's own call of torch
]


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_a_training_ends_at_the_sparsity(package):
    pytest.importorskip(package)
    callback = pruner_callback()
    model, trainer = fit(callback, model=model_class(package)(), package=package)
    assert callback.pruner.weights[0].schedules[0] == PolynomialDecay.for_training(2 * STEPS, final_sparsity=0.8)
    assert (callback.pruner.step_count, callback.pruner.finished) == (2 * STEPS, True)
    assert callback.pruner.sparsity == pytest.approx(0.8, abs=0.03)
    assert masked(callback, model)
    assert trainer.callback_metrics["sparsity"] == pytest.approx(callback.pruner.sparsity)


def test_it_is_off_the_optimizer_when_training_is_over():
    callback = pruner_callback()
    model, trainer = fit(callback)
    model.loss(torch.randn(4, 5, 3)).backward()
    trainer.optimizers[0].step()
    assert callback.pruner.step_count == 2 * STEPS
    assert not masked(callback, model)


def _saving_at(step, folder):
    return ModelCheckpoint(folder, every_n_train_steps=step, save_top_k=-1)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")  # the one that is resumed
@pytest.mark.parametrize("middle", [4, 12])  # masks still change, and are final
def test_a_resumed_training_ends_as_the_whole_one(middle, tmp_path):
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "max_epochs": 4}
    whole, resumed = pruner_callback(), pruner_callback()
    expected, _ = fit(whole, _saving_at(middle, tmp_path), **options)
    path = next(tmp_path.glob(f"*step={middle}.ckpt"))
    model: Any = model_class()()
    trainer = make_trainer(resumed, _saving_at(middle, tmp_path), **options)
    trainer.fit(model, loader(), loader(), ckpt_path=path)
    assert resumed.pruner.step_count == whole.pruner.step_count == 2 * STEPS
    for name, mask in whole.pruner.masks.items():
        assert torch.equal(resumed.pruner.masks[name], mask)
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)
    assert masked(resumed, model)


def test_a_longer_training_keeps_the_schedule_that_it_was_begun_with(tmp_path):
    first, longer = pruner_callback(), pruner_callback()
    _, trainer = fit(first)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    model: Any = model_class()()
    make_trainer(longer, max_epochs=3).fit(model, loader(), loader(), ckpt_path=tmp_path / "first.ckpt")
    assert longer.pruner.step_count == 3 * STEPS
    assert torch.equal(longer.pruner.masks["rnn.weight_hh_l0"], first.pruner.masks["rnn.weight_hh_l0"])
    assert masked(longer, model)


def test_pruning_begins_in_the_middle_of_a_training_that_was_dense(tmp_path):
    model, trainer = fit(Callback())
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    callback = pruner_callback()
    make_trainer(callback, max_epochs=4).fit(model, loader(), loader(), ckpt_path=tmp_path / "dense.ckpt")
    assert callback.pruner.step_count == 2 * STEPS
    assert callback.pruner.weights[0].schedules[0] == PolynomialDecay.for_training(2 * STEPS, final_sparsity=0.8)
    assert masked(callback, model)


def test_a_second_fit_goes_on_and_another_model_begins_anew():
    callback = pruner_callback()
    model, _ = fit(callback)
    pruner = callback.pruner
    fit(callback, model=model)
    assert (callback.pruner, pruner.step_count) == (pruner, 4 * STEPS)
    assert masked(callback, model)
    other, _ = fit(callback)
    assert callback.pruner is not pruner
    assert (pruner.step_count, callback.pruner.step_count) == (4 * STEPS, 2 * STEPS)
    assert masked(callback, other)


def test_a_checkpoint_that_was_only_validated_is_not_resumed(tmp_path):
    callback = pruner_callback()
    _, trainer = fit(callback)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    fresh = pruner_callback()
    trainer = make_trainer(fresh)
    trainer.validate(model_class()(), loader(), ckpt_path=tmp_path / "one.ckpt", verbose=False)
    trainer.fit(model_class()(), loader(), loader())
    assert fresh.pruner.step_count == 2 * STEPS


@pytest.mark.parametrize("saved", [{"total_steps": 16}, {"pruner": {}}, {"total_steps": 16, "pruner": 5}, {"wait": 3}])
def test_a_progress_of_something_else_is_refused(saved, tmp_path):
    path = tmp_path / "one.ckpt"
    _, trainer = fit(pruner_callback(), max_epochs=1)
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=False)
    assert checkpoint["callbacks"]["PrunerCallback"].keys() == {"total_steps", "pruner"}
    checkpoint["callbacks"]["PrunerCallback"] = saved
    torch.save(checkpoint, path)
    trainer = make_trainer(pruner_callback())
    with pytest.raises(ValueError, match=r"has a progress of PrunerCallback that this callback did not save: .* got "):
        trainer.fit(model_class()(), loader(), loader(), ckpt_path=path, weights_only=False)


def test_a_checkpoint_is_a_plain_model_to_load_and_convert(tmp_path):
    callback = pruner_callback()
    model, trainer = fit(callback)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    loaded = model_class().load_from_checkpoint(tmp_path / "one.ckpt").eval()
    x = torch.randn(2, 7, 3)
    assert torch.equal(loaded(x), model.eval()(x))
    fast = to_sparse(model, storage=(4, 1))  # with its trainer
    save_sparse(fast, tmp_path / "one.safetensors")
    again = load_sparse(model_class()().eval(), tmp_path / "one.safetensors")
    assert again.rnn.density < 0.4
    assert torch.equal(again(x), fast(x))
    torch.testing.assert_close(fast(x), loaded(x), rtol=1e-4, atol=1e-5)


class Skips(Callback):
    def __init__(self):
        self.steps = 0

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.steps += 1


def test_steps_that_mixed_precision_skips_do_not_count():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1000)  # type: ignore[attr-defined]
    callback, counted = pruner_callback(schedule=OneShot(sparsity=0.5, step=2)), Skips()
    model, _ = fit(callback, counted, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    halvings = 24 - round(torch.tensor(scaler.get_scale()).log2().item())
    assert halvings > 0
    assert callback.pruner.step_count == counted.steps - halvings == 2 * STEPS - halvings
    assert masked(callback, model)


def test_bfloat16():
    callback = pruner_callback()
    model, _ = fit(callback, precision="bf16-mixed")
    assert masked(callback, model)


def test_of_several_optimizers_it_follows_the_one_that_has_the_weights():
    callback = pruner_callback()
    model, _ = fit(callback, model=model_class()(optimizers=2))
    assert callback.pruner.step_count == 2 * STEPS
    assert masked(callback, model)


def test_weights_in_several_optimizers_are_refused():
    callback = pruner_callback(include=["head.weight"])
    with pytest.raises(ValueError, match=r"optimizer 0 has head.weight; optimizer 1 has rnn.weight_ih_l0, rnn"):
        fit(callback, model=model_class()(optimizers=2))


def test_a_compiled_layer():
    model: Any = model_class()()
    model.rnn = torch.compile(model.rnn, backend="eager")
    callback = pruner_callback()
    fit(callback, model=model, max_epochs=1)
    mask = callback.pruner.masks["rnn.weight_hh_l0"]
    assert mask.float().mean() == pytest.approx(0.2, abs=0.03)
    assert not model.get_parameter(callback.pruner.weights[1].path)[~mask].any()


def test_training_does_not_stop_while_pruning_and_the_best_is_pruned(tmp_path):
    class Worsens(model_class()):
        def validation_step(self, batch, index):
            self.log("val_loss", float(self.global_step))

    stopping = EarlyStopping("val_loss", patience=2)
    saving = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=1)
    callback = pruner_callback(schedule=OneShot(sparsity=0.8, step=5 * STEPS + 1))
    _, trainer = fit(callback, stopping, saving, model=Worsens(), max_epochs=20, check_val_every_n_epoch=1)
    assert trainer.current_epoch == 8  # the first validation of the pruned model is the best, two more are not
    assert callback.pruner.step_count == 8 * STEPS
    best = torch.load(saving.best_model_path, weights_only=True)
    assert best["global_step"] == 6 * STEPS
    assert saving.best_model_score == 6 * STEPS
    assert masked(callback, Worsens.load_from_checkpoint(saving.best_model_path))


def test_a_schedule_beyond_the_training_is_said_before_it():
    with pytest.warns(UserWarning, match="pruning is planned until step 100, but training ends at step 16"):
        fit(pruner_callback(schedule=OneShot(sparsity=0.5, step=100)))


def test_a_training_that_stops_before_the_schedule_says_so():
    class Stops(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = True

    with pytest.warns(UserWarning, match=r"training ended at step 1, .* until step 8: the weights are 26.3 % sparse"):
        fit(pruner_callback(), Stops())


def test_a_training_of_unknown_length_needs_a_schedule():
    class Stops(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    with pytest.raises(ValueError, match="does not know how many steps"):
        fit(pruner_callback(), max_epochs=-1)
    callback = pruner_callback(schedule=OneShot(sparsity=0.5, step=3))
    model, _ = fit(callback, Stops(), max_epochs=-1)
    assert masked(callback, model)


def test_a_failed_training_lets_go_of_the_model():
    class Fails(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 6:
                raise RuntimeError("no power")

    callback = pruner_callback(schedule=OneShot(sparsity=0.5, step=2))
    model: Any = model_class()()
    with pytest.raises(RuntimeError, match="no power"):
        fit(callback, Fails(), model=model)
    torch.optim.SGD(model.parameters(), lr=0.1).zero_grad()
    model.loss(torch.randn(4, 5, 3)).backward()
    mask = callback.pruner.masks["rnn.weight_hh_l0"]
    assert model.rnn.weight_hh_l0.grad[~mask].any()
    fit(callback, model=model)
    assert masked(callback, model)


def test_a_trial_run_of_one_step():
    callback = pruner_callback()
    fit(callback, fast_dev_run=True)
    assert callback.pruner.step_count == 1


def test_a_function_of_the_number_of_steps():
    callback = pruner_callback(schedule=lambda steps: ThresholdRamp.for_training(steps, q=0.2))
    model, _ = fit(callback)
    assert callback.pruner.weights[0].schedules[0] == ThresholdRamp.for_training(2 * STEPS, q=0.2)
    assert masked(callback, model)


def test_all_options_of_a_pruner_are_taken():
    parameters = inspect.signature(Pruner).parameters.values()
    assert PrunerOptions.__annotations__.keys() == {each.name for each in parameters if each.kind is each.KEYWORD_ONLY}
    callback = pruner_callback(split="layer")
    model, _ = fit(callback)
    assert callback.pruner.split == "layer"
    assert callback.pruner.sparsity == pytest.approx(0.8, abs=0.03)
    assert masked(callback, model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_copies_have_the_settings_without_the_pruner(copied):
    callback = pruner_callback(final_sparsity=0.5)
    fit(callback, max_epochs=1)
    other: Any = copied(callback)
    assert vars(other).get("pruner") is None
    model, _ = fit(other, max_epochs=1)
    assert other.pruner.sparsity == callback.pruner.sparsity == pytest.approx(0.5, abs=0.03)
    assert masked(other, model)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "schedule must be a schedule or a function", {"schedule": 0.9}),
        (ValueError, "not both", {"schedule": OneShot(sparsity=0.5, step=1), "final_sparsity": 0.9}),
        (ValueError, r"final_sparsity must be in \[0, 1\)", {"final_sparsity": 90}),
        (TypeError, "unknown arguments: blocks", {"blocks": (4, 1)}),
    ],
)
def test_bad_arguments_are_refused_at_once(error, message, options):
    with pytest.raises(error, match=message):
        PrunerCallback(**options)
