"""A Distillation of models that are wrapped, compiled, copied, converted, and changed after it was made."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import distributed, nn

from triton_sparse_rnn import SparseGRU, sparsify, to_dense, to_sparse
from triton_sparse_rnn.names import unwrapped
from triton_sparse_rnn.pruning import Distillation

X = torch.linspace(-2, 2, 3 * 4 * 5).sin().view(3, 4, 5)
TINY = pytest.approx(0, abs=1e-9)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn: Any = nn.GRU(5, 7, batch_first=True)
        self.head = nn.Linear(7, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


class Named(Net):
    """Its attribute has the name that wrappers use, but it does more than a wrapper."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(5, 5)

    def forward(self, x):
        return super().forward(2 * self.module(x))


@pytest.fixture
def group(tmp_path):
    if not distributed.is_available():
        pytest.skip("this torch is built without torch.distributed")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def halve(model):
    with torch.no_grad():
        model.rnn.weight_hh_l0.mul_(0.5)


def check_teaching(model, called, distillation):
    """The model, called through `called`, is as its teacher, and not after it was changed."""
    assert distillation.layers == ("rnn",)
    called.train()
    for _ in range(2):
        scores = called(X)
        assert distillation.loss().item() == TINY
        torch.testing.assert_close(distillation.taught, scores)
    halve(model)
    model.zero_grad()
    scores = called(X)
    loss = distillation.loss()
    assert loss.item() > 1e-4
    (loss + 0 * scores.sum()).backward()
    assert model.rnn.weight_hh_l0.grad.any()
    called.eval()
    called(X)
    with pytest.raises(RuntimeError, match=r"leave loss\(\) out in validation"):
        distillation.loss()


@pytest.mark.parametrize("made", ["before", "after"])
def test_data_parallel_processes(made, group):
    model = Net()
    distillation: Any = Distillation(model) if made == "before" else None
    wrapped = nn.parallel.DistributedDataParallel(model)
    check_teaching(model, wrapped, distillation or Distillation(wrapped))


def test_a_sharded_model_needs_a_teacher_that_was_made_before(group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = Net()
    teacher = copy.deepcopy(model)
    sharded = distribute_tensor(model.head.weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)])
    model.head.weight = nn.Parameter(sharded)
    with pytest.raises(
        TypeError, match=r"head\.weight is sharded, a DTensor, and model cannot be copied: make the teach"
    ):
        Distillation(model)
    assert Distillation(model, teacher).layers == ("rnn",)


@pytest.mark.filterwarnings("ignore:.*grad attribute of a Tensor that is not a leaf")  # while torch.compile looks
@pytest.mark.parametrize("made", ["before", "after", "when it has run", "of a compiled teacher"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model(made, in_place):
    torch.compiler.reset()
    model = Net()
    distillation: Any = Distillation(model) if made == "before" else None
    compiled: Any = model
    if in_place:
        model.compile(backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
    if made == "when it has run":
        compiled(X).sum().backward()
    if made == "of a compiled teacher":
        teacher: Any = torch.compile(copy.deepcopy(model), backend="eager")
        distillation = Distillation(model, teacher)
    check_teaching(model, compiled, distillation or Distillation(compiled))


def test_a_wrapped_model_may_be_called_without_the_wrapper():
    model = Net()
    compiled: Any = torch.compile(model, backend="eager")
    check_teaching(model, model, Distillation(compiled))


@pytest.mark.filterwarnings("ignore:.*grad attribute of a Tensor that is not a leaf")  # while torch.compile looks
@pytest.mark.parametrize("outer", [False, True])
def test_a_compiled_model_is_not_compiled_at_every_call(outer):
    torch.compiler.reset()
    model = Net()
    distillation = Distillation(model)
    compiled: Any = torch.compile(nn.Sequential(nn.Linear(5, 5), model) if outer else model, backend="eager")
    for _ in range(2):
        compiled(X)
        distillation.loss().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            compiled(X)
            assert distillation.loss().item() == TINY


def test_an_average_as_a_teacher():
    model = Net()
    check_teaching(model, model, Distillation(model, torch.optim.swa_utils.AveragedModel(model)))


def test_only_wrappers_are_unwrapped():
    model = Named()
    assert unwrapped(model) is model
    wrapped: Any = torch.compile(torch.optim.swa_utils.AveragedModel(Net()), backend="eager")
    assert type(unwrapped(wrapped)) is Net
    sequence = nn.Sequential()
    sequence.add_module("module", nn.GRU(5, 7))
    assert unwrapped(sequence) is sequence
    check_teaching(model, model, Distillation(model))


def test_a_replica_is_refused():
    model = Net()
    _distillation = Distillation(model)
    replica: Any = model._replicate_for_data_parallel()
    with pytest.raises(
        RuntimeError, match=r"replicas of nn\.DataParallel cannot be recorded .* DistributedDataParallel"
    ):
        replica(X)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model_are_free(duplicate):
    model = Net()
    distillation = Distillation(model)
    model.distillation = distillation  # type: ignore[assignment]
    other = duplicate(model)
    scores = model(X)
    with torch.no_grad():
        other.head.bias.add_(1)
    other(X + 1)
    other.rnn(X)
    assert distillation.loss().item() == TINY
    torch.testing.assert_close(distillation.taught, scores)
    assert repr(other.distillation) == "Distillation(removed)"
    with pytest.raises(RuntimeError, match="or is a copy, which belongs to no model: make one for the model"):
        other.distillation.loss()
    other.distillation = Distillation(other)
    check_teaching(other, other, other.distillation)


def test_copies_of_a_distillation():
    distillation = Distillation(Net())
    for other in (copy.copy(distillation), copy.deepcopy(distillation), pickle.loads(pickle.dumps(distillation))):
        assert repr(other) == "Distillation(removed)"
        assert other.taught is None
        other.remove()
    assert repr(distillation) == "Distillation(rnn, weight=1.0)"


def test_layers_that_are_swapped_for_training_ones_are_heard():
    model = Net()
    distillation = Distillation(model)
    sparsify(model)
    assert type(model.rnn) is SparseGRU
    check_teaching(model, model, distillation)


@pytest.mark.filterwarnings("ignore:.*zeros|.*dense")
def test_conversions_take_no_hooks_along():
    model = Net()
    distillation = Distillation(model)
    y = model(X)
    fast: Any = to_sparse(model)
    for converted in (fast, to_dense(fast).train()):
        torch.testing.assert_close(converted(X), y, rtol=1e-4, atol=1e-5)
        converted(X + 1)
    assert distillation.loss().item() == TINY
    assert list(model.state_dict()) == list(Net().state_dict())


def test_a_layer_that_returns_something_else():
    class Odd(nn.GRU):
        def forward(self, input, hx=None) -> Any:
            y, hx = super().forward(input, hx)
            return {"y": y} if self.odd else y

    model = Net()
    model.rnn = Odd(5, 7, batch_first=True)
    model.rnn.odd = False
    model.forward = lambda x: model.rnn(x)
    teacher = nn.ModuleDict({"rnn": nn.GRU(5, 7, batch_first=True)})
    teacher.forward = lambda x: teacher["rnn"](x)[0]
    distillation = Distillation(model, teacher)
    y = model(X)
    taught = distillation.taught
    assert distillation.loss().item() == pytest.approx(
        ((y - taught).square().mean() / taught.square().mean()).item(), rel=1e-5
    )
    model.rnn.odd = True
    with pytest.raises(TypeError, match=r"rnn must return its output sequence, .* but this Odd returned a dict: leave"):
        model(X)
    distillation.remove()
    Distillation(model, teacher, layers=())
    assert model(X).keys() == {"y"}
