import copy
import gc
import math
import weakref
from typing import Any

import pytest
import torch
from pruner_training import gru
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from triton_sparse_rnn import GateGradientSparsity, Pruner, SparseGRU, SparseLSTM, SparseRNN
from triton_sparse_rnn.pruning import Distillation, OneShot, divergence


class Net(nn.Module):
    """Two recurrent layers and a head."""

    def __init__(self, hidden=16, outer=7, dropout=0.0):
        super().__init__()
        self.inner = nn.GRU(5, hidden, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.LSTM(hidden, outer, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * outer, 3)

    def forward(self, x):
        return self.head(self.outer(self.dropout(self.inner(x)[0]))[0])


TINY = 1e-9  # a squared relative difference: with and without gradients torch rounds differently
X = torch.linspace(-2, 2, 3 * 4 * 5).sin().view(3, 4, 5)


def changed(model):
    """A copy with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return other


def sequence(y):
    return y.data if isinstance(y, PackedSequence) else y


def expected(ours, theirs):
    """The distance between output sequences, each that of one layer, or a list of them."""
    return ((ours - theirs).square().mean() / theirs.square().mean()).item()


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


def test_the_copy_is_a_frozen_dense_teacher_of_its_own():
    model = Net(dropout=0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    pruner = Pruner(model, OneShot(sparsity=0.5, step=1))
    pruner.attach(optimizer)
    model(X).square().mean().backward()  # gradients and hooks of the pruner are not copied
    names, keys = [name for name, _ in model.named_parameters()], list(model.state_dict())
    dense = copy.deepcopy(model).eval()
    distillation = Distillation(model)
    for _ in range(3):
        optimizer.zero_grad()
        (model(X).square().mean() + distillation.loss()).backward()
        optimizer.step()
        torch.testing.assert_close(distillation.taught, dense(X))
        assert distillation.taught.grad_fn is None
    assert pruner.sparsity == pytest.approx(0.5, abs=0.05)
    assert [name for name, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == keys
    teacher: Any = distillation._teacher
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    assert not any(module._forward_hooks for module in (teacher, teacher.head))  # its recurrent layers are recorded


def test_a_given_teacher_is_called_in_eval_mode_and_left_as_it_is():
    model, teacher = Net(), Net(dropout=0.9)
    teacher.inner.eval()
    distillation = Distillation(model, teacher)
    model(X)
    distillation.loss()
    taught = distillation.teacher(X)
    assert taught.grad_fn is None
    assert [module.training for module in teacher.modules()] == [True, False, True, True, True]
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    torch.testing.assert_close(taught, teacher.eval()(X))


class Speller(nn.Module):
    """Carries its state along, and says what it was called with."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(5, 7, batch_first=True)
        self.heard = []

    def forward(self, x, state=None, *, scale=1.0):
        self.heard.append((state, scale))
        return self.rnn(scale * x, state)


def test_the_teacher_gets_the_arguments_of_the_last_call():
    model = Speller()
    distillation = Distillation(model)
    teacher: Any = distillation._teacher
    _, state = model(x=X)
    model(X, state, scale=2.0)
    distillation.loss()
    assert teacher.heard == [(state, 2.0)]


@pytest.mark.parametrize("order", ["after", "before"])
def test_a_loop_that_carries_a_state_calls_the_teacher_itself(order):
    model, dense = Speller(), Speller()
    distillation = Distillation(model, dense)
    state = teacher_state = wanted_state = taught = None
    other = copy.deepcopy(dense)
    for step in range(3):
        x = X + step
        if order == "before":
            taught, teacher_state = distillation.teacher(x, teacher_state)
        y, state = model(x, None if state is None else state.detach())
        if order == "after":
            taught, teacher_state = distillation.teacher(x, teacher_state)
        wanted, wanted_state = other(x, wanted_state)
        torch.testing.assert_close(taught, wanted)
        assert distillation.loss().item() == pytest.approx(expected(y, wanted), rel=1e-5)
        assert distillation.taught[0] is taught
    assert len(dense.heard) == 3


def test_a_call_of_the_teacher_for_something_else_is_not_taken():
    model = Speller()
    distillation = Distillation(model)
    distillation.teacher(X + 1)
    y, _ = model(X)
    assert distillation.loss().item() == pytest.approx(0, abs=TINY)
    torch.testing.assert_close(distillation.taught[0], y)


def test_what_was_taught():
    model = Net()
    distillation: Any = Distillation(model, layers=["inner"])
    assert distillation.taught is None
    y = model(X)
    torch.testing.assert_close(distillation.taught, y)  # before loss() and after it: the teacher is called once
    taught = distillation.taught
    distillation.loss()
    assert distillation.taught is taught
    model.eval()(X + 1)
    assert distillation.taught is taught
    model.train()(X + 1)
    assert (distillation.taught - y).abs().max() > 1e-2


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


def test_a_teacher_called_in_inference_mode():
    model = Net()
    distillation = Distillation(model, changed(model))
    model(X)
    with torch.inference_mode():
        distillation.teacher(X)
    distillation.loss().backward()
    assert model.inner.weight_hh_l0.grad is not None


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


def test_two_teachers():
    model = Net()
    first, second = Distillation(model), Distillation(model, changed(model))
    model(X)
    assert first.loss().item() == pytest.approx(0, abs=TINY)
    assert second.loss().item() > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [True, False])
def test_autocast(dtype, inside):
    class Halved(nn.Module):
        def __init__(self):
            super().__init__()
            self.widen, self.rnn = nn.Linear(5, 5), gru(5, 7, batch_first=True)
            self.head = nn.Linear(7, 2)

        def forward(self, x):
            return self.head(self.rnn(self.widen(x).float())[0])

    model = Halved()
    teacher = changed(model)
    distillation = Distillation(model, teacher)
    wanted = expected(model.rnn(model.widen(X))[0], teacher.rnn(teacher.widen(X))[0])
    with torch.autocast("cpu", dtype=dtype):
        scores = model(X)
        loss: Any = distillation.loss() if inside else None
    loss = distillation.loss() if loss is None else loss
    assert distillation.taught.dtype == scores.dtype == dtype
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted, rel=0.05)
    model(X)
    with torch.autocast("cpu", dtype=dtype):
        assert distillation.taught.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_teacher_follows_the_models_dtype(dtype):
    model = Speller()
    distillation = Distillation(model)
    model.to(dtype)
    model(X.to(dtype))
    loss = distillation.loss()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert distillation.taught[0].dtype == dtype
    assert loss.item() == pytest.approx(0, abs=1e-4 if dtype == torch.bfloat16 else TINY)


def test_the_teacher_follows_the_model_to_its_device():
    model = Speller().to("meta")
    distillation = Distillation(model, Speller())
    model(X.to("meta"))
    loss = distillation.loss()
    assert loss.is_meta
    assert distillation.taught[0].is_meta


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


def test_predictions_only():
    model, wide = Net(), Net(hidden=32, outer=9)
    with pytest.raises(
        ValueError, match=r"inner returns 16 values for each step, and 32 .* layers=\(\)\), and divergence"
    ):
        Distillation(model, wide)
    distillation = Distillation(model, wide, layers=())
    scores = model(X)
    loss = divergence(scores, distillation.taught)
    loss.backward()
    torch.testing.assert_close(loss, divergence(scores, wide(X)))
    assert model.inner.weight_hh_l0.grad is not None
    assert repr(distillation) == "Distillation(no layers, weight=1.0)"
    with pytest.raises(ValueError, match=r"loss\(\) has no layers to compare"):
        distillation.loss()


@pytest.mark.parametrize("temperature", [0.5, 1, 2.0, 10.0])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 5)])
def test_divergence_is_that_of_softened_distributions(shape, temperature):
    scores, taught = torch.randn(2, *shape, dtype=torch.float64)
    scores.requires_grad_()
    p, q = ((one.detach() / temperature).softmax(-1) for one in (taught, scores))
    wanted = temperature**2 * (p * (p / q).log()).sum(-1).mean()
    loss = divergence(scores, taught.requires_grad_(), temperature)
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    torch.testing.assert_close(scores.grad, temperature * (q - p) / max(1, p[..., 0].numel()))
    assert taught.grad is None


def test_divergence_in_half_precision_and_with_classes_ruled_out():
    scores, taught = torch.randn(2, 3, 5)
    loss = divergence(scores.bfloat16(), taught.half())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, divergence(scores.bfloat16().float(), taught.half().float()))
    few = divergence(scores[:, :3], taught[:, :3])
    scores, taught = (one.index_fill(1, torch.tensor([3, 4]), -math.inf).requires_grad_() for one in (scores, taught))
    loss = divergence(scores, taught)
    torch.testing.assert_close(loss, few)
    loss.backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    with torch.inference_mode():
        taught = torch.randn(3, 5)
    divergence(torch.randn(3, 5, requires_grad=True), taught, temperature=1.0).backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], torch.ones(1)), "scores must be a tensor, got list"),
        ((torch.ones(1), {"logits": 1}), "taught must be a tensor, got dict"),
        ((torch.ones(2), torch.ones(2), "2"), "temperature must be a number above 0, got '2'"),
        ((torch.ones(2), torch.ones(2, dtype=torch.long)), "taught must be floating-point scores .* got torch.int64"),
    ],
)
def test_wrong_types_of_scores(arguments, message):
    with pytest.raises(TypeError, match=message):
        divergence(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3), torch.ones(3)), r"of one shape \[\.\.\., classes\], got \(2, 3\) and \(3,\)"),
        ((torch.tensor(1.0), torch.tensor(1.0)), "one shape"),
        *(
            ((torch.ones(2), torch.ones(2), T), "temperature must be a number above 0")
            for T in (0, -1.0, math.inf, math.nan)
        ),
    ],
)
def test_wrong_scores(arguments, message):
    with pytest.raises(ValueError, match=message):
        divergence(*arguments)
