import dataclasses
import functools
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from triton_sparse_rnn.nn.held_objects import copied_attributes, copied_objects, referred_modules


def found_in(value, kind: Any = torch.Tensor, stop=()):
    return [held for held in copied_objects(value, stop, {}) if isinstance(held, kind)]


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    a: Any
    b: Any = None


class Partly:
    """Says itself what of it is copied."""

    def __init__(self, copied, left):
        self.copied, self.left = copied, left

    def __getstate__(self):
        return {"copied": self.copied}


class Refusing(nn.Module):
    def __getstate__(self):
        raise RuntimeError("not outside of a group")


class OddDict(dict):
    def values(self):
        raise RuntimeError("no")


def test_objects_that_are_copied():
    one, two, three = torch.ones(1), torch.ones(2), torch.ones(3)
    cyclic: list[Any] = [one]
    cyclic.append(cyclic)
    assert found_in([cyclic, cyclic]) == [one]
    assert {*map(len, found_in(Slotted(one, Slotted((two,)))))} == {1, 2}
    assert found_in(Partly(one, two)) == [one]
    assert found_in(functools.partial(sum, one, start=two)) == [two, one]
    assert found_in(Slotted(one).__repr__) == [one]
    assert found_in(nn.utils.rnn.PackedSequence(one, two)) == [two, one]
    assert len(found_in(torch.distributions.Categorical(logits=three))) == 1
    assert found_in(OddDict(a=one)) == []
    assert found_in(lambda: one) == []
    assert found_in(weakref.ref(one)) == []
    shared = {"x": one}
    assert found_in([shared], stop={id(shared)}) == []


def test_attributes_that_are_copied():
    module: Any = Refusing()
    module.note = 3
    assert copied_attributes(module)["note"] == 3
    compiled: Any = torch.compile(nn.Identity(), backend="eager")
    assert "forward" in vars(compiled)
    assert "_orig_mod" in copied_attributes(compiled)["_modules"]


def modules_in(function):
    return [module for _, module in referred_modules(function)]


def test_what_functions_refer_to():
    layer, hidden = nn.Linear(1, 1), nn.Identity()

    def before_assignment():
        return later

    assert modules_in(before_assignment) == []
    later = layer
    assert modules_in(before_assignment) == [later]
    assert modules_in(lambda x=[hidden]: x) == [hidden]
    assert modules_in(functools.lru_cache(before_assignment)) == [layer]
    assert modules_in(functools.wraps(layer.forward)(lambda: 0)) == [layer]
    assert modules_in([layer].append) == [layer]
    assert modules_in(len) == []
    assert modules_in(weakref.ref(layer)) == [layer]
    gone = weakref.ref(nn.Identity())
    assert modules_in(gone) == []

    def itself():
        return itself, Slotted(layer, itself)

    assert modules_in(itself) == [layer]
    assert modules_in(test_what_functions_refer_to) == []  # globals do not count


@pytest.mark.parametrize("value", [None, 3, "text", int, torch.float32, torch, object()])
def test_what_holds_nothing(value):
    assert found_in(value, (torch.Tensor, nn.Module)) == []
