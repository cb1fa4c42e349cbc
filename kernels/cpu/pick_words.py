"""Picks once more, in words: what AVX-512 reads in place of their bytes, which must be widened before they permute.

A word is an int32 for each row of a unit. It holds the picks of up to six units, PICK_BITS each, the first in the
lowest bits; the instructions that permute look at the low bits only, so for the next unit a word is shifted. In each
class of each row of blocks (sparse/picked_storage.py) words begin anew, and entries are not divided:

    units of an entry   4               3                   2                   1
    entries in a word   1               2                   3                   4
    in a full word      a0 a1 a2 a3     a0 a1 a2 b0 b1 b2   a0 a1 b0 b1 c0 c1   a0 b0 c0 d0

(With six of the last, sums would not be taken in the order of those of 16x1 blocks.)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdRef, WeakTensorKeyDictionary

from triton_sparse_rnn.kernels.cpu.addresses import address_of
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.picks import ENTRY_UNITS

PICK_BITS = 5
_MOST = 32 // PICK_BITS


class PickWords(NamedTuple):
    """The picks of a matrix in words."""

    words: Tensor  # [NW, BR], int32
    starts: Tensor  # [rows of blocks * ENTRY_UNITS], int32, the first word of each class

    def addresses(self) -> dict[str, int]:
        """Return those that MatrixFields has."""
        named = {"words": self.words, "word_starts": self.starts}
        return {name: address_of(name, tensor, torch.int32, tensor.numel()) for name, tensor in named.items()}


def units_in_word(units: int) -> int:
    """Return how many units fill a word, where each entry has so many."""
    return _MOST if 1 < units < ENTRY_UNITS else ENTRY_UNITS


def pick_words(matrix: BlockMatrix) -> PickWords:
    """Return the words of picks below 2 ** PICK_BITS, of units with one column.

    Kept for as long as the picks live, and nothing was written into what they follow from: an operator prepares its
    layer at each call.
    """
    assert matrix.picks is not None
    indices = [matrix.picks, matrix.starts]
    if any(tensor.is_inference() for tensor in indices):  # torch counts no writes into these
        return _make(*indices)
    now = [(WeakIdRef(t), address_of("indices", t, t.dtype, t.numel()), t._version, t.shape) for t in indices]
    made = _MADE.get(matrix.picks)
    if made is None or made[0] != now:
        made = _MADE[matrix.picks] = now, _make(*indices)
    return made[1]


_MADE = WeakTensorKeyDictionary()


def _make(picks: Tensor, starts: Tensor) -> PickWords:
    """In numpy: these are many small operations, over each of which threads of torch would wait for one another."""
    units, begins = picks[:, 0].numpy(), starts.numpy().astype(np.int64)
    counts = np.diff(begins)
    sizes = [units_in_word(size) for size in range(ENTRY_UNITS, 0, -1)]
    full = np.tile(np.array(sizes, dtype=np.int64), len(counts) // ENTRY_UNITS)
    in_class = -(-counts // full)
    word_starts = np.cumsum(in_class) - in_class
    kind = np.repeat(np.arange(len(counts), dtype=np.int64), counts)  # [NB], each unit's class
    word, place = np.divmod(np.arange(len(units), dtype=np.int64) - begins[kind], full[kind])
    word += word_starts[kind]
    words = np.zeros((int(in_class.sum()), picks.shape[2]), dtype=np.int32)
    for number in range(_MOST):
        is_there = place == number
        words[word[is_there]] |= units[is_there].astype(np.int32) << PICK_BITS * number
    return PickWords(torch.from_numpy(words), torch.from_numpy(word_starts.astype(np.int32)))
