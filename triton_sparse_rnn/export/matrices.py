"""A weight as the C runtime reads it: vectors of 16 rows, dense, in blocks of 16 x 1, or in picks out of banks of 32.

What is stored so already is taken as it is; any other blocks and picks are stored anew. The order of everything, and
the words in which picks lie, are described in export/c/tsr_blob.h.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.picks import ENTRY_UNITS, Picks
from triton_sparse_rnn.sparse.row_blocks import UNITS, row_blocks

DENSE, BLOCKS, PICKS = range(3)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)  # in the order of their numbers in a blob
STORED_PICKS = Picks(rows=UNITS, bank=32)
_PICK_BITS = 5
_BLOCK_BYTES, _PICK_BYTES = 4, UNITS  # beside the weights of a vector, about


class CMatrix(NamedTuple):
    """A matrix [gates * rows, columns], in the arrays of tsr_blob.h.

    Attributes:
        pattern: DENSE, BLOCKS or PICKS.
        values: [vectors, 16], a dtype of DTYPES.
        counts: uint32, vectors of each row of blocks, or of each class of entries; empty if dense.
        places: uint32, the column of each vector, or the bank of each entry; empty if dense.
        words: [number, 16], uint32, for picks only, else empty.
        scales: [unit groups, gates, 16], float32, for int8 only, else empty.
    """

    pattern: int
    gates: int
    rows: int
    columns: int
    values: Tensor
    counts: np.ndarray
    places: np.ndarray
    words: np.ndarray
    scales: np.ndarray


def c_matrix(weight: BlockMatrix | Tensor, gates: int) -> CMatrix:
    """Return a weight [gates * H, columns] in the form of the C runtime.

    Args:
        weight: on any device; its dtype, or that of its values, is one of DTYPES, int8 in a BlockMatrix only.
        gates: of a dense weight; a BlockMatrix knows them.
    """
    if isinstance(weight, Tensor):
        return _dense(weight.detach().cpu(), gates)
    parts = {name: None if part is None else part.cpu() for name, part in weight.parts().items()}
    matrix = BlockMatrix.from_parts(parts, shape=weight.shape, gates=weight.gates)
    scales = _NOTHING if matrix.scales is None else by_group(matrix.scales, matrix.gates)
    if matrix.pattern == STORED_PICKS:
        return _picks(matrix, scales)
    # Stored anew, integers are floats meanwhile; they come back exactly.
    dtype, wide = matrix.values.dtype, dataclasses.replace(matrix, values=matrix.values.float(), scales=None)
    blocks = None if wide.is_picked else row_blocks(wide)
    if blocks is None or matrix.block_size[0] % UNITS:
        picked = BlockMatrix.from_dense(wide.to_dense(), STORED_PICKS, gates=matrix.gates)
        item_bytes = UNITS * dtype.itemsize
        if blocks is None or len(picked.values) * (item_bytes + _PICK_BYTES) < len(blocks.values) * (
            item_bytes + _BLOCK_BYTES
        ):
            return _picks(dataclasses.replace(picked, values=picked.values.to(dtype)), scales)
    return CMatrix(
        BLOCKS,
        gates=matrix.gates,
        rows=blocks.hidden_size,
        columns=matrix.shape[1],
        values=blocks.values.to(dtype),
        counts=blocks.starts.diff().numpy().astype(np.uint32),
        places=blocks.columns.numpy().astype(np.uint32),
        words=_NOTHING,
        scales=scales,
    )


def by_group(rows: Tensor, gates: int) -> np.ndarray:
    """Return a number for each of gates * H rows as [unit groups, gates, 16], filled up with zeros.

    >>> by_group(torch.arange(1, 5), 2)[0, :, :3].tolist()
    [[1.0, 2.0, 0.0], [3.0, 4.0, 0.0]]
    """
    by_gate = rows.detach().cpu().float().view(gates, -1)
    whole = F.pad(by_gate, (0, -by_gate.shape[1] % UNITS))
    return whole.unflatten(1, (-1, UNITS)).transpose(0, 1).contiguous().numpy()


_NOTHING = np.zeros(0, dtype=np.uint32)


def _dense(weight: Tensor, gates: int) -> CMatrix:
    by_gate = weight.unflatten(0, (gates, -1))
    rows = by_gate.shape[1]
    whole = F.pad(by_gate, (0, 0, 0, -rows % UNITS)).unflatten(1, (-1, UNITS))  # [G, groups, 16, columns]
    values = whole.permute(1, 0, 3, 2).reshape(-1, UNITS)
    return CMatrix(DENSE, gates, rows, weight.shape[1], values, _NOTHING, _NOTHING, _NOTHING, _NOTHING)


def _picks(matrix: BlockMatrix, scales: np.ndarray) -> CMatrix:
    """Of STORED_PICKS."""
    assert matrix.picks is not None
    begins = matrix.starts.numpy().astype(np.int64)
    sizes = np.tile(np.arange(ENTRY_UNITS, 0, -1), (len(begins) - 1) // ENTRY_UNITS)  # vectors in entries of a class
    counts = np.diff(begins) // sizes
    in_word = (ENTRY_UNITS + 1 - sizes) * sizes  # vectors
    words = -(-np.diff(begins) // in_word)
    kind = np.repeat(np.arange(len(counts)), np.diff(begins))  # the class of each vector
    within = np.arange(len(kind)) - begins[kind]
    word = (np.cumsum(words) - words)[kind] + within // in_word[kind]
    picks = matrix.picks[:, 0].numpy().astype(np.uint32) << (_PICK_BITS * (within % in_word[kind]))[:, None].astype(
        np.uint32
    )
    packed = np.zeros((int(words.sum()), UNITS), dtype=np.uint32)
    np.bitwise_or.at(packed, word, picks)
    return CMatrix(
        PICKS,
        gates=matrix.gates,
        rows=matrix.shape[0] // matrix.gates,
        columns=matrix.shape[1],
        values=matrix.values.view(-1, UNITS),
        counts=counts.astype(np.uint32),
        places=matrix.columns.numpy()[within % sizes[kind] == 0].astype(np.uint32),
        words=packed,
        scales=scales,
    )
