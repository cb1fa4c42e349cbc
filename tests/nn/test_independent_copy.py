import collections
import functools
import threading
import weakref
from typing import Any

import pytest
import torch
from layer_places import make_model
from torch import nn

from triton_sparse_rnn.nn import SparseGRU
from triton_sparse_rnn.nn.independent_copy import copy_with_replacements


def replace(model: Any, name="rnn") -> Any:
    """A copy with another layer under this name; what a layer is converted to does not matter here."""
    return copy_with_replacements(model, {name: SparseGRU(2, 3)})


def computed(*shape):
    return torch.ones(shape) * nn.Parameter(torch.ones(1))  # deepcopy by itself refuses such a tensor


def test_every_place_is_replaced_and_the_model_left():
    model = make_model()
    before = list(model.modules())
    new = {"rnn": SparseGRU(1, 1), "named.again": SparseGRU(1, 1)}
    copied: Any = copy_with_replacements(model, new)
    assert list(model.modules()) == before
    assert copied.rnn is copied.by_hand[0] is new["rnn"]
    assert copied.stack[0] is copied.named["again"] is new["named.again"]
    assert copied.chain is copied.same_chain is not model.chain
    assert torch.equal(copied.chain(torch.ones(1, 1, 2))[0], model.chain(torch.ones(1, 1, 2))[0])
    with pytest.raises(AttributeError, match="has no attribute `gru`"):
        replace(model, "gru")


def test_a_layer_by_itself_is_its_replacement():
    new = SparseGRU(2, 3)
    assert copy_with_replacements(nn.GRU(2, 3), {"": new}) is new


def test_nothing_is_shared_and_what_is_tied_stays_so():
    model = make_model()
    model.head = nn.Linear(3, 2)
    model.head.weight = model.stack[1].weight
    model.head.bias.requires_grad_(False)
    model.stack[1].weight.grad = torch.ones(2, 3)
    model.learned = torch.ones(2, requires_grad=True)
    model.learned.grad = torch.ones(2)
    model.whole = torch.arange(4.0)
    model.view = model.whole[1:3]
    copied = replace(model)
    assert copied.head.weight is copied.stack[1].weight is not model.head.weight
    assert (copied.head.weight.requires_grad, copied.head.bias.requires_grad) == (True, False)
    assert copied.learned.requires_grad
    assert copied.head.weight.grad is copied.learned.grad is None
    ours = {*map(torch.Tensor.data_ptr, [*copied.parameters(), *copied.buffers(), copied.scale, copied.learned])}
    theirs = {*map(torch.Tensor.data_ptr, [*model.parameters(), *model.buffers(), model.scale, model.learned])}
    assert not ours & theirs
    copied.whole[1] = 7
    assert copied.view.tolist() == [7, 2]
    assert model.view.tolist() == [1, 2]


class Kept:
    __slots__ = ("value",)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_results_of_computations_are_detached_wherever_they_are():
    model = make_model()
    tensors = [computed(2) for _ in range(10)]
    model.stack[1].hidden = [tensors[0], (tensors[1], {"c": [tensors[2]]}), {tensors[3]}]
    model.stack[1].hidden.append(model.stack[1].hidden)
    model.recent = collections.deque([tensors[4]], maxlen=3)
    model.by_hand = [nn.Identity()]
    model.by_hand[0].last = tensors[5]
    model.names = {tensors[6]: "last"}
    model.distribution = torch.distributions.Normal(tensors[7], tensors[8])
    model.kept = Kept()
    model.kept.value = tensors[9]
    model.packed = nn.utils.rnn.pack_sequence([computed(3, 2)])
    model.sparse = torch.eye(3).to_sparse_csr()
    copied = replace(model)
    ours, theirs = copied.stack[1].hidden, model.stack[1].hidden
    assert ours is ours[3] is not theirs
    found = [ours[0], ours[1][0], ours[1][1]["c"][0], *ours[2], *copied.recent, copied.by_hand[0].last, *copied.names]
    found += [copied.distribution.loc, copied.distribution.scale, copied.kept.value]
    for a, b in zip(found, tensors, strict=True):
        assert torch.equal(a, b)
        assert a.is_leaf
        assert not a.requires_grad
        assert a.data_ptr() != b.data_ptr()
    assert not copied.packed.data.requires_grad
    assert torch.equal(copied.sparse.values(), torch.ones(3))
    assert copied.recent is not model.recent
    assert copied.by_hand[0] is not model.by_hand[0]


def test_what_cannot_be_copied_is_named():
    model = make_model()
    model.rnn.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"model.rnn.lock holds a lock \(cannot pickle .* Take it away first"):
        replace(model)
    del model.rnn.lock
    model.stack[1].state = {"guard": threading.Lock()}
    message = r"model cannot be copied: model.stack.1.state holds a dict \(cannot pickle .*lock.* object\)\. Take it"
    with pytest.raises(TypeError, match=message):
        replace(model)
    del model.stack[1].state
    model.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"model.lock holds a lock .* as in model.rnn = to_sparse\(model.rnn\)"):
        replace(model)


def test_a_module_that_refuses_to_be_copied_says_so_itself():
    class Single(nn.Module):
        def __deepcopy__(self, memo):
            raise RuntimeError("there is only one")

    with pytest.raises(RuntimeError, match="there is only one"):
        replace(nn.Sequential(nn.GRU(2, 3), Single()), "0")


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.inner, self.calls = nn.GRU(2, 3), nn.Identity(), 0
        self.inner.register_forward_hook(self.count)
        self.rnn.register_forward_hook(functools.partial(self.count))
        self.handle = self.rnn.register_forward_pre_hook(self.count)
        self.run = functools.partial(self.rnn)
        self.run_too = self.run_once

    def count(self, *args):
        self.calls += 1

    def run_once(self, x):
        return self.rnn(x)

    def forward(self, x):
        return self.run(self.inner(x)), self.run_too(x)


def test_bound_methods_and_partials_act_on_the_copy():
    model: Any = Counting()
    copied = replace(model)
    nn.init.zeros_(copied.rnn.weight_hh_l0)
    copied(torch.ones(1, 1, 2))
    assert (copied.calls, model.calls) == (5, 0)
    assert copied.run.func is copied.run_too.__self__.rnn is copied.rnn
    copied.handle.remove()
    assert not copied.rnn._forward_pre_hooks
    assert model.rnn._forward_pre_hooks


def hook_of(module):
    return lambda *args: module


def set_list(model):
    model.functions = [{"run": hook_of([model.rnn])}]


def set_default(model):
    model.run = lambda x, layer=model.rnn: layer(x)


def set_attribute(model):
    def run():
        pass

    run.layer = functools.partial(model.count)  # type: ignore[attr-defined]
    model.run = run


def set_method_of_a_closure(model):
    class Runner:
        def run(self):
            return model

    model.run = Runner().run


def set_object(model):
    runner = Kept()
    runner.value = (model,)
    model.run = lambda: runner


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "run", torch.no_grad()(m.rnn)), r"model.run holds a function '.*to model.rnn by its"),
        (
            lambda m: setattr(m, "forward", torch.no_grad()(m.forward)),
            r"model.forward holds a function 'Counting.forward', which refers to the model itself by its .*variable "
            r"'func'.* running the original. Take it away \(del model.forward\) and set it on the copy again, or "
            r"convert the layer itself and put the result in its place, as in model.rnn = to_sparse\(model.rnn\)",
        ),
        (lambda m: m.inner.register_forward_hook(hook_of(m)), "model.inner._forward_hooks .*'hook_of.*Remove that"),
        (lambda m: m.rnn.register_forward_hook(hook_of(m)), "model.rnn._forward_hooks holds a function 'hook_of"),
        (lambda m: m.rnn.register_full_backward_hook(hook_of(m.rnn)), "model.rnn._backward_hooks"),
        (lambda m: setattr(m.rnn, "note", hook_of(m.rnn)), "model.rnn.note .* model.rnn by its variable 'module'"),
        (set_list, "model.functions .* to model.rnn by its variable 'module'"),
        (set_default, "model.run .*'set_default.<locals>.<lambda>', .* to model.rnn by a default argument"),
        (set_attribute, "model.run .*to the model itself by its attribute 'layer'"),
        (set_method_of_a_closure, "model.run .*to the model itself by its variable 'model'"),
        (set_object, "model.run .*to the model itself by its variable 'runner'"),
        (lambda m: setattr(m, "run", functools.lru_cache(m.run_once)), "model.run .* by its attribute '__wrapped__'"),
        (lambda m: setattr(m.inner, "parent", weakref.ref(m)), "model.inner.parent .* to the model itself weakly"),
    ],
)
def test_functions_that_refer_to_what_changes_are_refused(change, message):
    model: Any = Counting()
    change(model)
    with pytest.raises(TypeError, match=message):
        replace(model)


def test_functions_that_refer_to_something_else():
    model: Any = Counting()
    other, seen = nn.Linear(2, 2), []
    model.other = hook_of(other)  # no part of the model
    model.rnn.register_forward_hook(lambda *args: seen.append(args))
    model.inner.note = hook_of(model.inner)  # holds nothing that could change
    model.calls_of = len
    copied = replace(model)
    assert copied.other() is other
    copied(torch.ones(1, 1, 2))
    assert len(seen) == 2


def test_functions_that_refer_to_other_tensors_of_the_model_are_said():
    model: Any = make_model()
    model.head = hook_of(model.stack[1])
    with pytest.warns(UserWarning, match=r"changes the copy will follow: model.head \(model.stack.1\); set them on"):
        replace(model)


def test_copy_reaches_into_compiled_modules():
    compiled: Any = torch.compile(nn.GRU(2, 3), backend="eager")
    model = nn.Sequential(compiled)
    copied = replace(model, "0._orig_mod")
    x = torch.ones(1, 1, 2)
    assert torch.equal(copied(x)[0], copied[0]._orig_mod(x)[0])
    assert not torch.equal(copied(x)[0], model(x)[0])


def test_outside_of_a_layer_by_itself_everything_stays():
    model: Any = Counting()
    recorder = Recorder()
    model.rnn.register_forward_hook(recorder.record)
    model.rnn.owner = [model]
    model.rnn.table = [1]
    new: Any = copy_with_replacements(model.rnn, {"": SparseGRU(2, 3)})
    assert new.owner[0] is model
    assert new.table is not model.rnn.table
    new(torch.ones(1, 1, 2))
    assert model.calls == 2
    assert len(recorder.seen) == 1
    model.forward = torch.no_grad()(model.forward)
    model.rnn.register_forward_hook(hook_of(model))
    copy_with_replacements(model.rnn, {"": SparseGRU(2, 3)})
    model.rnn.register_forward_hook(hook_of(model.rnn))
    with pytest.raises(TypeError, match=r"model\._forward_hooks holds .* refers to the model itself by its"):
        copy_with_replacements(model.rnn, {"": SparseGRU(2, 3)})


class Recorder:
    def __init__(self):
        self.seen, self.lock = [], threading.Lock()

    def record(self, *args):
        self.seen.append(args)
