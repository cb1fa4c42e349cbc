"""A Distillation while a model is pruned by Lightning, Hugging Face's Trainer, Fabric and accelerate."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from triton_sparse_rnn import Distillation, OneShot, Pruner, divergence

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # data this small needs none
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.* is deprecated"),  # Lightning's own call of torch
    pytest.mark.filterwarnings("ignore:.*pin_memory.* argument is set as true but no accelerator"),  # of every Trainer
]
STEPS = 8  # batches of an epoch


class Tagger(nn.Module):
    """Takes keyword arguments, as models of transformers do, and returns a dict."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.GRU(3, 16, batch_first=True)
        self.head = nn.Linear(16, 2)

    def forward(self, *, x, labels=None):
        logits = self.head(self.rnn(x)[0])
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


class TaggerOfItems(Tagger):
    """As newer models of transformers: the loss of a batch is divided by what all accumulated batches have."""

    def forward(self, *, x, labels=None, **others):
        outputs = super().forward(x=x, labels=labels)
        if labels is not None and "num_items_in_batch" in others:
            outputs["loss"] = outputs["loss"] * labels.numel() / others["num_items_in_batch"]
        return outputs


def tagged():
    x = torch.randn(4 * STEPS, 5, 3, generator=torch.Generator().manual_seed(1))
    return [{"x": row, "labels": (row.sum(1) > 0).long()} for row in x]


def batch():
    return {name: torch.stack([row[name] for row in tagged()]) for name in ("x", "labels")}


def hooks_in(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def check_learned(model, dense, data):
    """The pruned model went on from the dense one, which stayed as it was."""
    zeros = (model.weight_hh_l0 == 0).float().mean().item()
    assert zeros == pytest.approx(0.8, abs=0.03)
    assert not torch.equal(dense.bias_hh_l0, model.bias_hh_l0)
    difference, power = (dense(data)[0] - model(data)[0]).square().mean(), dense(data)[0].square().mean()
    assert (difference / power).item() < 0.5  # 1 would be as far as zeros


@pytest.mark.parametrize("root", ["rnn", "self"])
@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning(package, root, tmp_path):
    pytest.importorskip(package)
    training = pytest.importorskip("lightning_training")
    terms = []

    class Taught(training.model_class(package)):
        def on_fit_start(self):
            self.distillation: Any = Distillation(self if root == "self" else self.rnn)

        def training_step(self, batch, index):
            loss = self.loss(batch)
            terms.append(self.distillation.loss())
            return loss + terms[-1]

    model = Taught()
    names = list(model.state_dict())
    dense = copy.deepcopy(model.rnn)
    options: Any = {"accumulate_grad_batches": 2, "max_epochs": 4, "package": package}
    trainer = training.make_trainer(training.pruner_callback(), **options)
    trainer.fit(model, training.loader(), training.loader())
    assert terms[0].item() == pytest.approx(0, abs=1e-9)
    assert max(term.item() for term in terms) > 1e-3
    assert len(terms) == 4 * STEPS
    check_learned(model.rnn, dense, next(iter(training.loader())))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == names == list(model.state_dict())
    assert "distillation" not in dict(model.named_modules())
    other: Any = copy.deepcopy(model)
    assert repr(other.distillation) == "Distillation(removed)"
    other(torch.ones(1, 1, 3))  # its hooks do nothing
    before = hooks_in(model)
    with pytest.warns(UserWarning, match=r"\d+ % of the recurrent and input weights of model are zeros"):
        model.on_fit_start()  # of a second training: the first one's hooks go with it
    assert hooks_in(model) == before


@pytest.fixture
def trainer_of(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def make(model, teach, *callbacks, trainer_class=None, compute_loss_func=None, **options) -> Any:
        class TaughtTrainer(trainer_class or transformers.Trainer):
            def compute_loss(self, model, inputs, return_outputs=False, **others):
                loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **others)
                if model.training and teach is not None:
                    loss = loss + teach(self, outputs)
                return (loss, outputs) if return_outputs else loss

        options = {"num_train_epochs": 2, "save_strategy": "no", "per_device_train_batch_size": 4, **options}
        arguments = transformers.TrainingArguments(
            str(tmp_path), use_cpu=True, disable_tqdm=True, report_to=[], learning_rate=0.01, **options
        )
        return TaughtTrainer(
            model,
            arguments,
            train_dataset=tagged(),
            eval_dataset=tagged()[:4],
            callbacks=list(callbacks),
            compute_loss_func=compute_loss_func,
        )

    return make


def pruner_callback() -> Any:
    huggingface = pytest.importorskip("triton_sparse_rnn.integrations.huggingface")
    return huggingface.PrunerCallback(final_sparsity=0.8, pattern=(4, 1))


@pytest.mark.filterwarnings("ignore:.*grad attribute of a Tensor that is not a leaf")  # while torch.compile looks
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "num_train_epochs": 4},
        {"bf16": True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=str,
)
def test_huggingface(options, trainer_of, tmp_path):
    torch.compiler.reset()
    callback = pruner_callback()
    model: Any = Tagger()
    dense = copy.deepcopy(model)
    terms = []

    def teach(trainer, outputs):
        terms.append(distillation.loss() + divergence(outputs["logits"], distillation.taught["logits"]))
        return terms[-1]

    with Distillation(model) as distillation:
        trainer = trainer_of(model, teach, callback, eval_strategy="epoch", save_strategy="epoch", **options)
        trainer.train()
    assert hooks_in(model) == 0
    assert terms[0].item() == pytest.approx(0, abs=1e-3 if "bf16" in options else 1e-6)
    assert len(terms) == options.get("num_train_epochs", 2) * STEPS
    assert callback.pruner.finished
    check_learned(model.rnn, dense.rnn, tagged()[0]["x"])
    safetensors = pytest.importorskip("safetensors.torch")
    saved = max(tmp_path.glob("checkpoint-*/model.safetensors"))
    assert {*safetensors.load_file(saved)} == {*dense.state_dict()}


def test_huggingface_by_a_function(trainer_of):
    model: Any = Tagger()
    distillation = Distillation(model)
    terms = []

    def loss_of(outputs, labels, num_items_in_batch: Any = None):
        loss = F.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten(), reduction="sum") / num_items_in_batch
        if not model.training:
            return loss
        terms.append(distillation.loss() / 2)  # of two batches to accumulate
        return loss + terms[-1]

    trainer = trainer_of(
        model, None, pruner_callback(), compute_loss_func=loss_of, gradient_accumulation_steps=2, num_train_epochs=4
    )
    trainer.train()
    assert len(terms) == 4 * STEPS
    assert max(terms).item() > 1e-3


@pytest.mark.parametrize("model_class", [Tagger, TaggerOfItems])
@pytest.mark.parametrize("accumulated", [1, 4])
def test_accumulated_gradients_are_those_of_a_large_batch(model_class, accumulated, trainer_of):
    transformers = pytest.importorskip("transformers")
    model: Any = model_class()
    teacher: Any = model_class()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(2)
    size = 4 * STEPS // accumulated
    model.train()
    with Distillation(model, teacher) as distillation:
        for part in range(accumulated):
            inputs = {name: tensor[part * size : (part + 1) * size] for name, tensor in batch().items()}
            loss = model(**inputs)["loss"] + distillation.loss()
            (loss / accumulated).backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    got = []

    class Looks(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, *, model, **others):
            got.extend(parameter.grad.clone() for parameter in model.parameters())

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(tagged())

    def teach(trainer: Any, outputs):
        parts = trainer.args.gradient_accumulation_steps if model_class is TaggerOfItems else 1
        return distillation.loss() / parts

    distillation = Distillation(model, teacher)
    trainer = trainer_of(
        model,
        teach,
        Looks(),
        trainer_class=InOrder,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulated,
        max_grad_norm=0,
        max_steps=1,
    )
    trainer.train()
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def _forget_accelerators(accelerate):
    """There is one for a process, which each Trainer makes too."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")
    _forget_accelerators(accelerate)
    yield accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    _forget_accelerators(accelerate)


def _by_accelerate(request, model, optimizer):
    accelerator = request.getfixturevalue("accelerator")
    return *accelerator.prepare(model, optimizer), accelerator.backward


def _by_fabric(request, model, optimizer):
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    return *fabric.setup(model, optimizer), fabric.backward


@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize("prepare", [_by_accelerate, _by_fabric])
def test_a_model_that_was_prepared(prepare, made, request):
    model: Any = Tagger()
    dense = copy.deepcopy(model)
    early: Any = Distillation(model) if made == "before" else None
    prepared, optimizer, backward = prepare(request, model, torch.optim.Adam(model.parameters(), lr=0.01))
    distillation = early or Distillation(prepared)
    assert distillation.layers == ("rnn",)
    pruner = Pruner(prepared, OneShot(sparsity=0.8, step=2), pattern=(4, 1))
    pruner.attach(optimizer)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        outputs = prepared(**batch())
        losses.append(distillation.loss())
        backward(outputs["loss"] + losses[-1])
        optimizer.step()
    assert losses[0].item() == pytest.approx(0, abs=1e-4)
    assert losses[0].dtype == torch.float32
    assert max(losses) > 1e-2
    check_learned(model.rnn, dense.rnn, tagged()[0]["x"])
