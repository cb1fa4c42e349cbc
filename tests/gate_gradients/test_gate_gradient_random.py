import math

import pytest
import torch

from triton_sparse_rnn.gate_gradients.random import hash32, uniform

BITS = 2**32 - 1


def python_hash(x: int) -> int:
    """The hash of the module's docstring in Python's integers."""
    x = ((x ^ x >> 16) * 0x7FEB352D) & BITS
    x = ((x ^ x >> 15) * 0x846CA68B) & BITS
    return x ^ x >> 16


def python_uniform(seed: int, n: int, j: int) -> float:
    row = python_hash(((seed ^ n) + 0x9E3779B9) & BITS)
    return ((python_hash((row + j) & BITS) >> 9) + 0.5) / 2**23


CORNERS = [0, 1, 2, 255, 2**16 - 1, 2**16, 2**31 - 1, 2**31, BITS - 1, BITS, 0x9E3779B9, BITS - 0x9E3779B9 + 1]


def test_the_hash_is_that_of_the_docstring():
    torch.manual_seed(0)
    numbers = CORNERS + torch.randint(0, 2**32, (1_000,)).tolist()
    hashes = hash32(torch.tensor(numbers)).tolist()
    assert hashes == [python_hash(number) for number in numbers]
    assert [hash32(number) for number in numbers] == hashes
    assert len(set(hashes)) == len(set(numbers))  # 32 bits to 32 bits, and nothing is lost


@pytest.mark.parametrize("seed", CORNERS)
def test_numbers_are_those_of_the_docstring(seed):
    n, j = torch.tensor([0, 1, 77, 2**31 - 1]), torch.tensor([0, 3, 4 * 1024 * 64, 2**31 - 1])
    u = uniform(torch.tensor([seed]), n[:, None], j)
    assert u.dtype == torch.float32
    assert u.tolist() == [[python_uniform(seed, row, column) for column in j.tolist()] for row in n.tolist()]


def test_numbers_are_uniform():
    u = uniform(torch.tensor([12345]), torch.arange(500)[:, None], torch.arange(400)).double()
    assert u.min() > 0
    assert u.max() < 1
    counts = torch.histc(u, 100, 0, 1)
    chi_square = ((counts - 2_000) ** 2 / 2_000).sum()  # of 99 degrees of freedom: 99 on average, deviation 14
    assert 50 < chi_square < 150


@pytest.mark.parametrize(("rows", "columns"), [(0, 1), (1, 0), (1, -1), (0, 64), (32, 0)])
def test_neighbours_are_independent(rows, columns):
    seed, n, j = torch.tensor([python_hash(7)]), torch.arange(300)[:, None], torch.arange(256) + 64
    u, neighbour = uniform(seed, n, j) - 0.5, uniform(seed, n + rows, j + columns) - 0.5
    assert (u * neighbour).mean().abs() * 12 < 5 / math.sqrt(u.numel())  # five deviations of that correlation


def test_seeds_are_independent():
    n, j = torch.arange(300)[:, None], torch.arange(256)
    u, other = (uniform(torch.tensor([python_hash(step)]), n, j) - 0.5 for step in (7, 8))
    assert (u * other).mean().abs() * 12 < 5 / math.sqrt(u.numel())
