"""Several optimizers in Lightning, optimization by hand, and more than one of the pruner's callbacks."""

from typing import Any

import pytest
import torch

from triton_sparse_rnn import OneShot, PolynomialDecay

pytest.importorskip("lightning")

from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning_training import STEPS, fit, loader, make_trainer, masked, model_class, pruner_callback

from triton_sparse_rnn.integrations.lightning import PrunerCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # data this small needs none
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.* is deprecated"),  # Lightning's own call of torch
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists"),  # the one that is resumed
]


def adversaries(generator_every=1, critic_steps=1) -> Any:
    """A model of two optimizers, of the head and of the layer that is pruned, which step at their own pace."""

    class Model(model_class()):
        def training_step(self, batch, index):
            critic, generator = self.optimizers()
            self.manual_backward(self.loss(batch))
            for _ in range(critic_steps):
                critic.step()
            if (index + 1) % generator_every == 0:
                generator.step()
            for optimizer in (critic, generator):
                optimizer.zero_grad()

    return Model(optimizers=2)


def test_the_schedule_and_the_count_are_those_of_one_optimizer():
    callback = pruner_callback()
    model, trainer = fit(callback, model=adversaries(critic_steps=5))
    assert trainer.global_step == 6 * 2 * STEPS
    assert callback.pruner.step_count == 2 * STEPS
    assert callback.pruner.weights[0].schedules[0] == PolynomialDecay.for_training(2 * STEPS, final_sparsity=0.8)
    assert masked(callback, model)


@pytest.mark.parametrize("critic_steps", [1, 5])
def test_a_resumed_training_of_several_optimizers_ends_as_the_whole_one(critic_steps, tmp_path):
    whole, resumed = pruner_callback(), pruner_callback()

    def saving():
        return ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1)

    expected, _ = fit(whole, saving(), model=adversaries(critic_steps=critic_steps), max_epochs=3)
    model, path = adversaries(critic_steps=critic_steps), next(tmp_path.glob("epoch=1*.ckpt"))
    make_trainer(resumed, saving(), max_epochs=3).fit(model, loader(), loader(), ckpt_path=path)
    assert resumed.pruner.step_count == whole.pruner.step_count == 3 * STEPS
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)
    assert masked(resumed, model)


def test_pruning_begins_in_the_middle_of_a_training_by_several_optimizers(tmp_path):
    model, trainer = fit(Callback(), model=adversaries())
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    callback = pruner_callback()
    make_trainer(callback, max_epochs=4).fit(model, loader(), loader(), ckpt_path=tmp_path / "dense.ckpt")
    assert callback.pruner.weights[0].schedules[0] == PolynomialDecay.for_training(2 * STEPS, final_sparsity=0.8)
    assert callback.pruner.finished
    assert masked(callback, model)


def test_an_optimizer_that_steps_less_than_once_a_batch_is_noticed_after_an_epoch():
    callback = pruner_callback()
    steps = PolynomialDecay.for_training(4 * STEPS, final_sparsity=0.8).last_step
    with pytest.warns(
        UserWarning, match=f"pruning is planned until step {steps}, but training ends at step 8"
    ) as caught:
        fit(callback, model=adversaries(generator_every=4), max_epochs=4)
    assert callback.pruner.step_count == STEPS
    assert sum("pruning" in str(one.message) for one in caught) == 1  # and not again when training ends
    fitting = pruner_callback(schedule=OneShot(sparsity=0.8, step=7))
    model, _ = fit(fitting, model=adversaries(generator_every=4), max_epochs=4)
    assert fitting.pruner.finished
    assert masked(fitting, model)


def test_a_limit_that_optimizers_share_needs_a_schedule():
    with pytest.raises(ValueError, match=r"does not know how many steps .*max_steps, which several optimizers share"):
        fit(pruner_callback(), model=adversaries(), max_steps=20)
    callback = pruner_callback(schedule=OneShot(sparsity=0.8, step=8))
    model, trainer = fit(callback, model=adversaries(), max_steps=20)
    assert (trainer.global_step, callback.pruner.step_count) == (20, 10)
    assert masked(callback, model)


def test_data_without_a_length_needs_a_limit_or_a_schedule():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(torch.randn(4 * STEPS, 5, 3, generator=torch.Generator().manual_seed(1)))

    stream = torch.utils.data.DataLoader(Stream(), batch_size=4)
    with pytest.raises(ValueError, match="does not know how many steps"):
        make_trainer(pruner_callback()).fit(model_class()(), stream, loader())
    for options in ({"callback": {}, "max_steps": 11}, {"callback": {"schedule": OneShot(sparsity=0.8, step=9)}}):
        callback = pruner_callback(**options["callback"])
        model = model_class()()
        make_trainer(callback, max_steps=options.get("max_steps", -1)).fit(model, stream, loader())
        assert callback.pruner.finished
        assert masked(callback, model)


def test_two_callbacks_of_one_trainer_are_refused():
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `PrunerCallback`"):  # by Lightning
        make_trainer(pruner_callback(), pruner_callback())

    class Other(PrunerCallback):
        """Which Lightning takes for something else."""

    other: Any = Other(final_sparsity=0.5, targets={"*ih*": None}, pattern=(4, 1))
    model = model_class()()
    with pytest.raises(ValueError, match=r"a trainer takes one Other, .* got two: give one callback .* by targets="):
        fit(pruner_callback(targets={"*hh*": None}), other, model=model)
    callback = pruner_callback(targets={"*hh*": OneShot(sparsity=0.5, step=3)})  # the way out
    fit(callback, model=model)
    assert callback.pruner.sparsities["rnn.weight_hh_l0"] == 0.5
    assert callback.pruner.sparsities["rnn.weight_ih_l0"] == pytest.approx(0.8, abs=0.05)
    assert masked(callback, model)


def test_a_callback_of_a_training_that_nobody_ended_stands_in_nobodys_way():
    first, second = pruner_callback(), pruner_callback()
    model, trainer = fit(first)
    first._start(trainer, model, trainer.optimizers, 100)  # and never on_fit_end
    fit(second, model=model)
    assert (first.pruner.step_count, second.pruner.step_count) == (2 * STEPS, 2 * STEPS)
    assert masked(second, model)
