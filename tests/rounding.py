"""How far two right results may be apart that sum the same numbers, each in an order of its own.

A matrix product of torch sums in the order that its library likes best for the instructions and threads that there are,
and for the shapes, strides and addresses of what it is given. So tests ask for equal bits only of what this package's
own code computes, or of one operator that is given the same numbers laid out in the same way. All else is compared
within what follows from how many numbers are summed, never within what one machine has shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def rounding_of_sums(terms: int, dtype: torch.dtype = torch.float32) -> float:
    """Return how far two sums of so many terms may be apart, as a share of the largest partial sum.

    Each addition rounds up or down by at most eps / 2, with a standard deviation of at most eps / sqrt(12). Those of
    both sums together, as they know nothing of each other, come to eps * sqrt(terms / 6). Five times that is hardly
    ever exceeded, and an error of the formula exceeds it by far.
    """
    return 2 * torch.finfo(dtype).eps * math.sqrt(terms)


def terms_of(module: nn.Module) -> int:
    """Return how many numbers meet in a unit of the last layer: a column of every weight, and every bias.

    For all steps of an RNN, too: it forgets the roundings of a step while it makes those of the next.
    """
    return sum(parameter.shape[1] if parameter.dim() == 2 else 1 for parameter in module.parameters())


def assert_same_sums(ours: Sequence[Tensor], theirs: Sequence[Tensor], terms: int) -> None:
    """Equal but for the rounding of sums, as a share of the largest number of each tensor, or of 1."""
    for a, b in zip(ours, theirs, strict=True):
        size = b.detach().nan_to_num(posinf=0, neginf=0).abs().amax().clamp(min=1).item() if b.numel() else 1
        atol = rounding_of_sums(terms, b.dtype) * size
        torch.testing.assert_close(a, b, rtol=0, atol=atol, equal_nan=True)


def assert_exact_product(product: Tensor, left: Tensor, right: Tensor) -> None:
    """Within what roundings in any order can come to at most, for each element: terms eps / 2 sum |left| |right|."""
    terms = (left != 0).double().sum(1, keepdim=True)
    bound = (terms + 1) * torch.finfo(product.dtype).eps / 2 * (left.double().abs() @ right.double().abs())
    assert ((product - left.double() @ right.double()).abs() <= bound).all()
