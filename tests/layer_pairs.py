"""What the tests share that do the same to a layer of torch.nn and to ours: sizes, and how results are compared."""

from typing import Any

import torch
from torch import Tensor

T, B, I, H = 5, 3, 4, 7


def identify(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else str(value)


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor of a call's result, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [] if value is None else [tensor for part in value for tensor in tensors_of(part)]


def assert_same(actual: Any, expected: Any, rounding: float = 0) -> None:
    """To the bit, or within a share of their size: bits are for operators that are given the same numbers alike."""
    assert type(actual) is type(expected)
    ours, theirs = tensors_of(actual), tensors_of(expected)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert error([one], [other])[0] <= rounding if rounding else torch.equal(one, other)


def error(actual: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [
        float((one.double() - other).detach().norm() / other.detach().norm().clamp(min=1e-30))
        for one, other in zip(actual, exact, strict=True)
    ]
