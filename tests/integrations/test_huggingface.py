import json
from typing import Any

import pytest
import torch
from torch import nn

from triton_sparse_rnn import OneShot, PolynomialDecay, load_sparse, save_sparse, to_sparse

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import (
    EarlyStoppingCallback,
    PretrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from triton_sparse_rnn.integrations.huggingface import PrunerCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.* argument is set as true but no accelerator"),  # of every Trainer
]
STEPS = 8  # batches of an epoch


class Config(PretrainedConfig):
    model_type = "tagger"

    def __init__(self, hidden_size=16, **others):
        super().__init__(**others)
        self.hidden_size = hidden_size


class Tagger(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.rnn = nn.GRU(3, config.hidden_size, batch_first=True)
        self.head = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def _init_weights(self, module):
        """Leave what torch.nn drew."""

    def forward(self, x, labels=None):
        y = self.head(self.rnn(x)[0])
        return {"loss": (y - labels).square().mean() if labels is not None else None, "logits": y}


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 16, batch_first=True)
        self.head = nn.Linear(16, 1)

    forward = Tagger.forward


def make_model(model_class: Any = Tagger):
    torch.manual_seed(0)
    return model_class(Config()) if model_class is Tagger else model_class()


def data():
    x = torch.randn(4 * STEPS, 5, 3, generator=torch.Generator().manual_seed(1))
    return [{"x": row, "labels": row.cumsum(0)[:, :1]} for row in x]


def make_trainer(folder, *callbacks, model: Any = None, trainer_class=Trainer, **options):
    options = {"num_train_epochs": 2, "save_strategy": "no", "logging_steps": 1, **options}
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        learning_rate=0.01,
        per_device_train_batch_size=4,
        **options,
    )
    model = make_model() if model is None else model
    return trainer_class(model, arguments, train_dataset=data(), eval_dataset=data()[:4], callbacks=list(callbacks))


def pruner_callback(**options) -> Any:
    settings: dict[str, Any] = {"pattern": (4, 1)} | ({} if "schedule" in options else {"final_sparsity": 0.8})
    return PrunerCallback(**settings | options)


def masked(callback, model):
    """Whether what the masks prune is zero, and something is pruned."""
    weights = dict(model.named_parameters())
    zeros = [not weights[name][~mask].any() for name, mask in callback.pruner.masks.items()]
    return callback.pruner.sparsity > 0 and all(zeros)


@pytest.mark.parametrize("model_class", [Tagger, Plain])
def test_a_training_ends_at_the_sparsity(model_class, tmp_path):
    callback = pruner_callback()
    trainer = make_trainer(tmp_path, callback, model=make_model(model_class))
    trainer.train()
    assert callback.pruner.weights[0].schedules[0] == PolynomialDecay.for_training(2 * STEPS, final_sparsity=0.8)
    assert (callback.pruner.step_count, callback.pruner.finished) == (2 * STEPS, True)
    assert callback.pruner.sparsity == pytest.approx(0.8, abs=0.03)
    assert masked(callback, trainer.model)
    logged = [entry["sparsity"] for entry in trainer.state.log_history]
    assert logged == sorted(logged)
    assert logged[0] < logged[-1] == callback.pruner.sparsity


def test_it_is_off_the_optimizer_when_training_is_over(tmp_path):
    callback = pruner_callback()
    trainer = make_trainer(tmp_path, callback)
    trainer.train()
    model: Any = trainer.model
    model(torch.randn(4, 5, 3), torch.zeros(4, 5, 1))["loss"].backward()
    optimizer: Any = trainer.optimizer
    optimizer.param_groups[0]["lr"] = 0.1  # at the end of training it is 0
    optimizer.step()
    assert callback.pruner.step_count == 2 * STEPS
    assert not masked(callback, model)


@pytest.mark.parametrize("middle", [5, 9])  # masks still change, and are final
def test_a_resumed_training_ends_as_the_whole_one(middle, tmp_path):
    options: dict[str, Any] = {
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.1,
        "num_train_epochs": 4,
        "save_strategy": "steps",
        "save_steps": middle,
    }
    whole, resumed = pruner_callback(), pruner_callback()
    expected: Any = make_trainer(tmp_path / "whole", whole, **options)
    expected.train()
    moved = (tmp_path / "whole" / f"checkpoint-{middle}").rename(tmp_path / "elsewhere")
    trainer: Any = make_trainer(tmp_path / "resumed", resumed, **options)
    trainer.train(resume_from_checkpoint=str(moved))
    assert resumed.pruner.step_count == whole.pruner.step_count == 2 * STEPS
    for name, mask in whole.pruner.masks.items():
        assert torch.equal(resumed.pruner.masks[name], mask)
    for one, other in zip(trainer.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert masked(resumed, trainer.model)


def test_pruning_begins_in_the_middle_of_a_training_that_was_dense(tmp_path):
    options: dict[str, Any] = {"save_strategy": "epoch", "num_train_epochs": 2}
    make_trainer(tmp_path, **options).train()
    callback = pruner_callback()
    trainer = make_trainer(tmp_path, callback, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}"))
    assert callback.pruner.step_count == STEPS
    assert callback.pruner.finished
    assert masked(callback, trainer.model)


def test_a_longer_training_keeps_the_schedule_that_it_was_begun_with(tmp_path):
    first, longer = pruner_callback(), pruner_callback()
    make_trainer(tmp_path, first, save_strategy="epoch").train()
    trainer = make_trainer(tmp_path, longer, num_train_epochs=3)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{2 * STEPS}"))
    assert longer.pruner.step_count == 3 * STEPS
    assert torch.equal(longer.pruner.masks["rnn.weight_hh_l0"], first.pruner.masks["rnn.weight_hh_l0"])
    assert masked(longer, trainer.model)


def test_a_second_training_goes_on_and_another_model_begins_anew(tmp_path):
    callback = pruner_callback()
    trainer = make_trainer(tmp_path, callback)
    trainer.train()
    pruner = callback.pruner
    trainer.train()
    assert (callback.pruner, pruner.step_count) == (pruner, 4 * STEPS)
    assert masked(callback, trainer.model)
    other = make_trainer(tmp_path, callback)
    other.train()
    assert callback.pruner is not pruner
    assert callback.pruner.step_count == 2 * STEPS
    assert masked(callback, other.model)


class Worsens(Trainer):
    """Whose model is the worse, the longer it is trained."""

    def evaluate(self, *arguments, **options):
        metrics = {"eval_loss": float(self.state.global_step)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


@pytest.mark.parametrize("first", [True, False])
def test_training_does_not_stop_while_pruning_and_the_best_is_pruned(first, tmp_path):
    callback = pruner_callback(schedule=OneShot(sparsity=0.8, step=3 * STEPS + 1))
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = make_trainer(
        tmp_path,
        *((callback, stopping) if first else (stopping, callback)),
        trainer_class=Worsens,
        num_train_epochs=20,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer.train()
    assert callback.pruner.step_count == 6 * STEPS  # evaluated first at 4 * STEPS with the final mask, twice in vain
    assert trainer.state.best_metric == 4 * STEPS
    assert callback.pruner.sparsity == pytest.approx(0.8, abs=0.03)
    assert masked(callback, trainer.model)
    assert [path.name for path in tmp_path.iterdir()] == [f"checkpoint-{4 * STEPS}"]


def test_a_checkpoint_is_a_plain_model_to_load_and_convert(tmp_path):
    callback = pruner_callback()
    trainer = make_trainer(tmp_path, callback, save_strategy="epoch")
    trainer.train()
    loaded: Any = Tagger.from_pretrained(tmp_path / f"checkpoint-{2 * STEPS}")
    model: Any = trainer.model
    x = torch.randn(2, 7, 3)
    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))
    fast: Any = to_sparse(model.eval(), storage=(4, 1))
    save_sparse(fast, tmp_path / "one.safetensors")
    again: Any = load_sparse(make_model().eval(), tmp_path / "one.safetensors")
    assert again.rnn.density < 0.4
    assert torch.equal(again(x)["logits"], fast(x)["logits"])
    torch.testing.assert_close(fast(x)["logits"], loaded(x)["logits"], rtol=1e-4, atol=1e-5)


def _damage_mask(text):
    def damage(state):
        state["progress"]["pruner"]["weights"]["rnn.weight_hh_l0"]["mask"]["base64"] = text

    return damage


DAMAGES = [
    *map(_damage_mask, ["AAA", "AAAA", "not a text in base 64!", "\xe4", "", 5, None]),
    lambda state: state.pop("progress"),
    lambda state: state.update(progress=0),
    lambda state: state.update(progress=None),
    lambda state: state.update(progress=[1, 2]),
    lambda state: state["progress"].pop("pruner"),
    lambda state: state["progress"].pop("total_steps"),
    lambda state: state["progress"].update(pruner=3),
    lambda state: state["progress"].update(total_steps="16"),
    lambda state: state["progress"].update(total_steps=1),
    lambda state: state["progress"].update(another=1),
]


def test_a_progress_of_something_else_is_refused(tmp_path):
    make_trainer(tmp_path, pruner_callback(), save_strategy="epoch").train()
    path = tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json"
    text = path.read_text(encoding="utf-8")
    trainer = make_trainer(tmp_path, pruner_callback())
    for damage in DAMAGES:
        state = json.loads(text)
        damage(state["stateful_callbacks"]["PrunerCallback"])
        path.write_text(json.dumps(state), encoding="utf-8")
        with pytest.raises(
            ValueError, match=r"a progress of PrunerCallback that this .* did not save: .* got |damaged mask"
        ):
            trainer.train(resume_from_checkpoint=str(path.parent))


def test_bfloat16(tmp_path):
    callback = pruner_callback()
    trainer = make_trainer(tmp_path, callback, bf16=True)
    trainer.train()
    assert callback.pruner.step_count == 2 * STEPS
    assert masked(callback, trainer.model)


@pytest.mark.filterwarnings("ignore:.*grad attribute of a Tensor that is not a leaf")  # while torch.compile looks
def test_a_compiled_model(tmp_path):
    callback = pruner_callback()
    trainer = make_trainer(tmp_path, callback, torch_compile=True, torch_compile_backend="eager", num_train_epochs=1)
    trainer.train()
    assert set(callback.pruner.masks) == {"rnn.weight_ih_l0", "rnn.weight_hh_l0"}
    assert masked(callback, trainer.model)


class Stops(TrainerCallback):
    def on_step_end(self, args, state, control, **others):
        control.should_training_stop = True


def test_a_training_that_stops_before_the_schedule_says_so(tmp_path):
    with pytest.warns(UserWarning, match=r"training ended at step 1, .* until step 8: the weights are 26.3 % sparse"):
        make_trainer(tmp_path, pruner_callback(), Stops()).train()


def test_a_schedule_beyond_the_training_is_said_before_it(tmp_path):
    with pytest.warns(UserWarning, match="pruning is planned until step 100, but training ends at step 16"):
        make_trainer(tmp_path, pruner_callback(schedule=OneShot(sparsity=0.5, step=100))).train()


def test_a_failed_training_can_be_begun_anew(tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            if state.global_step == 6:
                raise RuntimeError("no power")

    callback = pruner_callback(schedule=OneShot(sparsity=0.5, step=2))
    model = make_model()
    with pytest.raises(RuntimeError, match="no power"):
        make_trainer(tmp_path, callback, Fails(), model=model).train()
    make_trainer(tmp_path, callback, model=model).train()
    assert callback.pruner.step_count == 6 + 2 * STEPS
    assert masked(callback, model)


def test_callbacks_made_anew_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, pruner_callback(), restore_callback_states_from_checkpoint=True)
    with pytest.raises(ValueError, match="leave it False"):
        trainer.train()


@pytest.mark.parametrize("resume", [False, True])
def test_two_callbacks_of_one_trainer_are_refused(resume, tmp_path):
    options: dict[str, Any] = {"save_strategy": "epoch"}
    path = None
    if resume:
        make_trainer(tmp_path, pruner_callback(targets={"*hh*": None}), **options).train()
        path = str(tmp_path / f"checkpoint-{STEPS}")
    both = pruner_callback(targets={"*hh*": None}), pruner_callback(targets={"*ih*": None})
    trainer = make_trainer(tmp_path, *both, **options)
    with pytest.raises(
        ValueError, match=r"a trainer takes one PrunerCallback, .* got two: give one callback .* targets="
    ):
        trainer.train(resume_from_checkpoint=path)
    callback = pruner_callback(targets={"*hh*": OneShot(sparsity=0.5, step=3)})  # the way out
    trainer = make_trainer(tmp_path / "other", callback, model=trainer.model, **options)
    trainer.train()
    assert callback.pruner.sparsities["rnn.weight_hh_l0"] == 0.5
    assert masked(callback, trainer.model)


def test_a_training_that_was_given_up_stands_in_nobodys_way(tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            raise KeyboardInterrupt

    first, second = pruner_callback(), pruner_callback()
    model = make_model()
    given_up = make_trainer(tmp_path, first, Fails(), model=model)
    with pytest.raises(KeyboardInterrupt):
        given_up.train()
    make_trainer(tmp_path, second, model=model).train()
    assert (first.pruner.step_count, second.pruner.step_count) == (1, 2 * STEPS)
    assert masked(second, model)


def test_an_average_that_is_put_into_the_model_is_found_out(tmp_path):
    class OwnAverage(TrainerCallback):
        def on_train_begin(self, args, state, control, *, model, **others):
            self.kept = [parameter.detach().clone() for parameter in model.parameters()]

        def on_train_end(self, args, state, control, *, model, **others):
            for kept, parameter in zip(self.kept, model.parameters(), strict=True):
                parameter.data.copy_(kept)

    callback = pruner_callback()
    trainer = make_trainer(tmp_path, OwnAverage(), callback)
    with pytest.warns(UserWarning, match=r"were written to since the step of AcceleratedOptimizer"):
        trainer.train()
    assert masked(callback, trainer.model)
