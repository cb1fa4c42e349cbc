"""Random numbers of the "sample" rule: a hash of where they are used, so that every backend draws the same.

    hash(x):  x ^= x >> 16;  x *= 0x7feb352d;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16     (32 bits, wraps around)
    u(seed, n, j) = ((hash(hash((seed ^ n) + 0x9e3779b9) + j) >> 9) + 0.5) / 2^23        in (0, 1), exact in float32

n is the row of the batch (the first row of a block), as it is counted in `Steps`; j the element (gate * H + unit), or
the number of the block of units. u is never 0, so a group far below its threshold is never kept and multiplied by
infinity. The hash is one of those that C. Wellons found by search ("lowbias32"). Seeds that differ in few bits permute
rows, so they are hashed before they come here.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

IntegersT = TypeVar("IntegersT", Tensor, int)

LOW_BITS = 0xFFFFFFFF


def hash32(x: IntegersT) -> IntegersT:
    """Hash integers (int64 in a tensor) from 0 to 2^32 - 1, element by element, to such numbers."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & LOW_BITS
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & LOW_BITS  # what int64 loses lies above 32 bits
    return x ^ (x >> 16)


def uniform(seed: Tensor, n: Tensor, j: Tensor) -> Tensor:
    """Return u(seed, n, j), float32, of the shape that the int64 tensors broadcast to.

    >>> uniform(torch.tensor(1), torch.tensor([0, 1]), torch.tensor(0)).tolist()
    [0.13681453466415405, 0.6813889145851135]
    """
    bits = hash32((hash32(((seed ^ n) + 0x9E3779B9) & LOW_BITS) + j) & LOW_BITS) >> 9
    return (bits.to(torch.float32) + 0.5) * 2.0**-23


def mix(*numbers: int) -> int:
    """Hash integers from 0 to one of 32 bits.

    >>> mix(0, 1) != mix(1, 0)
    True
    """
    key = 0
    for number in numbers:
        key = (hash32((key ^ number) & LOW_BITS) + 0x9E3779B9) & LOW_BITS
    return key
