"""The loss of a Distillation: what it compares, when, and what it keeps."""

import copy
import gc
import math
import weakref
from typing import Any

import pytest
import torch
from distillation_models import TINY, Net, Speller, X, changed, expected
from pruner_training import gru
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from triton_sparse_rnn import GateGradientSparsity, SparseGRU, SparseLSTM, SparseRNN
from triton_sparse_rnn.pruning import Distillation


def sequence(y):
    return y.data if isinstance(y, PackedSequence) else y


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # says torch's own
@pytest.mark.parametrize("form", ["batch", "batch_first", "unbatched", "packed"])
@pytest.mark.parametrize(
    ("layer_class", "options"),
    [
        (nn.RNN, {"nonlinearity": "relu"}),
        (nn.GRU, {"num_layers": 2}),
        (nn.GRU, {"bidirectional": True}),
        (nn.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
        (SparseRNN, {}),
        (SparseGRU, {"num_layers": 2}),
        (SparseLSTM, {}),
        (SparseLSTM, {"gate_gradient": GateGradientSparsity(target=0.5)}),
    ],
)
def test_a_layer_by_itself(layer_class, options, form):
    layer = layer_class(5, 7, batch_first=form == "batch_first", **options)
    teacher = changed(layer)
    x: Any = X[0] if form == "unbatched" else X
    if form == "packed":
        x = pack_padded_sequence(X.transpose(0, 1), torch.tensor([2, 4, 1]), enforce_sorted=False)
    y, _ = layer(x)
    with Distillation(layer, teacher) as distillation:
        assert distillation.layers == ("",)
        layer(x)
        loss = distillation.loss()
    assert loss.item() == pytest.approx(expected(sequence(y), sequence(teacher(x)[0])), rel=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_mean_over_layers_and_its_gradient():
    model, weight = Net(), 0.3
    teacher = changed(model)
    distillation = Distillation(model, teacher, weight=weight)
    scores = model(X)
    inner, taught_inner = model.inner(X)[0], teacher.inner(X)[0].detach()
    outer, taught_outer = model.outer(inner)[0], teacher.outer(taught_inner)[0].detach()
    terms = [(y - t).square().mean() / t.square().mean() for y, t in ((inner, taught_inner), (outer, taught_outer))]
    wanted = torch.autograd.grad(
        weight * (terms[0] + terms[1]) / 2, [*model.inner.parameters(), *model.outer.parameters()]
    )
    loss = distillation.loss()
    torch.testing.assert_close(loss, weight * (terms[0] + terms[1]) / 2)
    (loss + 0 * scores.sum()).backward()
    got = [parameter.grad for layer in (model.inner, model.outer) for parameter in layer.parameters()]
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(distillation.taught, teacher(X))


@pytest.mark.parametrize(
    ("globs", "names"), [(["inner"], ("inner",)), (("*out*",), ("outer",)), (("*", "inner"), None)]
)
def test_layers_are_chosen_by_globs(globs, names):
    model = Net()
    distillation = Distillation(model, layers=globs)
    assert distillation.layers == (names or ("inner", "outer"))
    model(X)
    assert distillation.loss().item() == pytest.approx(0, abs=TINY)
    assert repr(distillation) == f"Distillation({', '.join(distillation.layers)}, weight=1.0)"


def test_a_layer_that_is_called_several_times_counts_as_one_sequence():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = gru(5, 7)
            self.skipped = gru(5, 7)

        def forward(self, x, lengths=(1, 1, 2)):
            ys, state = [], None
            for part in x.split(lengths):
                y, state = self.rnn(part, state)
                ys.append(y)
            return torch.cat(ys)

    model = Steps()
    teacher = changed(model)
    distillation = Distillation(model, teacher)
    x = X.transpose(0, 1)
    y = model(x)
    assert distillation.loss().item() == pytest.approx(expected(y, teacher(x)), rel=1e-5)
    model(x)
    distillation.teacher(x, (2, 2))
    with pytest.raises(
        RuntimeError, match=r"rnn ran 3 times in the last call of the model, and 2 times in the teacher"
    ):
        distillation.loss()
    model(x)
    distillation.teacher(x[:, :2])
    with pytest.raises(
        RuntimeError, match=r"rnn returned \(1, 3, 7\) in the model and \(1, 2, 7\) in the teacher: .* same"
    ):
        distillation.loss()


def test_of_several_calls_the_last_counts():
    model = Speller()
    distillation = Distillation(model, changed(model))
    with torch.no_grad():
        wanted = [expected(model(x)[0], distillation.teacher(x)[0]) for x in (X, 2 * X)]
    model(2 * X)
    model(X)
    assert distillation.loss().item() == pytest.approx(wanted[0], rel=1e-5)
    assert wanted[0] != pytest.approx(wanted[1], rel=1e-2)


def test_loss_needs_a_call_in_training():
    model = Net()
    distillation = Distillation(model)
    with torch.no_grad():
        model(X)
    model.eval()(X)
    with pytest.raises(RuntimeError, match=r"call the model in training mode, with gradients, before loss\(\); leave"):
        distillation.loss()
    model.train()
    model(X)
    distillation.loss()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"computed already for the last call of the model in training mode"):
            distillation.loss()
        model.eval()(X)
    model.train()
    with pytest.raises(RuntimeError, match=r"mat1 and mat2|input.size"):
        model(X[..., :2])
    model.eval()(X)
    with pytest.raises(RuntimeError, match=r"call the model in training mode"):  # it failed
        distillation.loss()
    model.train()
    model(X)
    assert distillation.loss().item() == pytest.approx(0, abs=TINY)


def test_a_part_of_the_model_is_no_call_of_it():
    model = Net()
    distillation = Distillation(model)
    model.outer(model.inner(X)[0])
    with pytest.raises(RuntimeError, match=r"layers ran, but the model was not called itself .* such as self\.net"):
        distillation.loss()


def test_a_call_in_which_no_layer_ran():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = gru(5, 7)

        def forward(self, x):
            return x

    model = Sometimes()
    distillation = Distillation(model)
    model(X)
    with pytest.raises(RuntimeError, match="none of the layers rnn ran in the last call of the model"):
        distillation.loss()


def test_nothing_is_kept_after_loss():
    model = Net()
    distillation = Distillation(model)
    held = []
    model.inner.register_forward_hook(lambda module, args, result: held.append(weakref.ref(result[0])))
    distillation._teacher.inner.register_forward_hook(lambda *call: held.append(weakref.ref(call[2][0])))  # type: ignore[union-attr, reportCallIssue]
    x = X.clone()
    held.append(weakref.ref(x))
    loss = model(x).square().mean() + distillation.loss()
    loss.backward()
    del x, loss
    gc.collect()
    assert len(held) == 3
    assert all(one() is None for one in held)
    taught = weakref.ref(distillation.taught)
    model(X)  # without loss(): what was recorded goes with the next call
    recorded = weakref.ref(distillation._recorder.last)
    assert taught() is None
    model(X)
    assert recorded() is None
    distillation.loss()
    distillation.remove()
    assert not model._forward_pre_hooks


def test_removing():
    model = Net()
    distillation = Distillation(model)
    model(X)
    distillation.remove()
    distillation.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert distillation.taught is None
    assert (distillation.layers, repr(distillation)) == ((), "Distillation(removed)")
    for call in (distillation.loss, lambda: distillation.teacher(X)):
        with pytest.raises(RuntimeError, match="this Distillation was removed, or is a copy"):
            call()
    dropped = Distillation(model)
    model(X)
    assert dropped.loss().item() == pytest.approx(0, abs=TINY)
    del dropped
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_large_half_precision_outputs_are_summed_in_float32():
    layer: Any = nn.RNN(1, 4, nonlinearity="relu").half()
    teacher = copy.deepcopy(layer)
    for one, bias in ((layer, 1000), (teacher, 2000)):
        for parameter in one.parameters():
            nn.init.zeros_(parameter)
        nn.init.constant_(one.bias_ih_l0, bias)
    distillation = Distillation(layer, teacher)
    layer(torch.zeros(9, 3, 1, dtype=torch.float16))
    assert distillation.loss().item() == 0.25


@pytest.mark.parametrize("batch", [0, 3])
def test_a_teacher_of_zeros_or_an_empty_batch_gives_no_nan(batch):
    layer = gru(5, 7)
    teacher = copy.deepcopy(layer)
    for parameter in teacher.parameters():
        nn.init.zeros_(parameter)
    distillation = Distillation(layer, teacher)
    layer(torch.ones(4, batch, 5))
    loss = distillation.loss()
    assert math.isfinite(loss.item())
    assert (loss.item() > 0) == (batch > 0)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    class Checkpointed(Net):
        reentrant = None

        def forward(self, x):
            if self.reentrant is None:
                return super().forward(x)
            y: Any = checkpoint(lambda x: self.inner(x)[0], x.requires_grad_(), use_reentrant=self.reentrant)
            return self.head(self.outer(y)[0])

    model = Checkpointed()
    distillation = Distillation(model, changed(model), layers=["outer"] if reentrant else None)
    gradients = []
    for model.reentrant in (None, reentrant):
        model.zero_grad()
        for _ in range(2):
            (model(X.clone()).square().mean() + distillation.loss()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_the_weight_may_change():
    model = Speller()
    distillation = Distillation(model, changed(model), weight=0)
    losses = []
    for distillation.weight in (0, 1, 2.5):
        model(X)
        losses.append(distillation.loss().item())
    assert losses == pytest.approx([0, losses[1], 2.5 * losses[1]])


@pytest.mark.parametrize(
    ("weight", "error"),
    [*((one, ValueError) for one in (-1, math.nan, math.inf)), *((one, TypeError) for one in (True, "1", None))],
)
def test_a_wrong_weight(weight, error):
    with pytest.raises(error, match=r"weight must be a number of 0 or more, got"):
        Distillation(Net(), weight=weight)
