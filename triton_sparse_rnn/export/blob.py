"""A chain of layers as the bytes that the C runtime reads: see export/c/tsr_blob.h."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from triton_sparse_rnn.export.chain import CLayer
from triton_sparse_rnn.export.matrices import DTYPES, CMatrix

MAGIC, ORDER, VERSION = b"TSRCHAIN", 0x01020304, 1
ALIGNMENT = 64
MOST_UNITS = 2**24  # of any size of a layer
_HEADER = struct.Struct("<8s2IQI4I5I")
_LAYER = struct.Struct("<8I")
_MATRIX = struct.Struct("<16I")
_CRC_OFFSET, _CRC_FROM = 24, 28
assert (_HEADER.size, _LAYER.size, _MATRIX.size) == (64, 32, 64)


def make_blob(layers: Sequence[CLayer]) -> bytes:
    """Return the bytes of a chain. The same layers give the same bytes.

    Raises:
        ValueError: a layer is larger than the runtime takes.
    """
    for layer in layers:
        if (largest := max(layer.inputs, layer.hidden)) > MOST_UNITS:
            raise ValueError(f"a layer of {largest} units is wider than the C runtime takes, {MOST_UNITS}")
    matrices = [matrix for layer in layers for matrix in layer.matrices]
    arrays = _Arrays(_HEADER.size + _LAYER.size * len(layers) + _MATRIX.size * len(matrices))
    described, table = [], []
    for layer in layers:
        described.append(_describe(layer, len(table)))
        per_direction = len(layer.matrices) // layer.directions
        for number, matrix in enumerate(layer.matrices):
            direction, place = divmod(number, per_direction)
            table.append(_record(matrix, arrays, layer.biases[direction] if place == 0 else None))
    outputs = layers[-1].outputs * layers[-1].directions
    size = arrays.end
    header = _HEADER.pack(
        MAGIC, ORDER, VERSION, size, 0, len(layers), len(table), layers[0].inputs, outputs, *([0] * 5)
    )
    blob = bytearray(header + b"".join(described) + b"".join(table))
    for content in arrays.contents:
        blob += b"\0" * (-len(blob) % ALIGNMENT) + content
    assert len(blob) == size
    struct.pack_into("<I", blob, _CRC_OFFSET, zlib.crc32(memoryview(blob)[_CRC_FROM:]))
    return bytes(blob)


class _Arrays:
    """The arrays behind the tables."""

    def __init__(self, begin: int) -> None:
        self.contents: list[bytes] = []
        self.end = begin

    def add(self, array: Any) -> int:
        """Take an array and return where it will begin, in units of 64 bytes; 0 for one that is empty."""
        content = _little_endian(array)
        if not content:
            return 0
        begin = -(-self.end // ALIGNMENT)
        if begin >= 2**32:
            raise ValueError("the weights of a chain must be less than 256 GB")
        self.contents.append(content)
        self.end = begin * ALIGNMENT + len(content)
        return begin


def _describe(layer: CLayer, first_matrix: int) -> bytes:
    sizes = (layer.inputs, layer.hidden, layer.outputs, layer.directions)
    return _LAYER.pack(layer.kind, *sizes, first_matrix, layer.function, 0)


def _record(matrix: CMatrix, arrays: _Arrays, biases: Any) -> bytes:
    return _MATRIX.pack(
        matrix.pattern,
        DTYPES.index(matrix.values.dtype),
        matrix.gates,
        matrix.rows,
        matrix.columns,
        len(matrix.values),
        arrays.add(matrix.values),
        arrays.add(matrix.counts),
        arrays.add(matrix.places),
        len(matrix.places),
        arrays.add(matrix.words),
        len(matrix.words),
        arrays.add(matrix.scales),
        0 if biases is None else arrays.add(biases),
        0,
        0,
    )


def _little_endian(array: Tensor | np.ndarray) -> bytes:
    if isinstance(array, Tensor):
        array = array.detach().contiguous()
        array = (array.view(torch.int16) if array.dtype == torch.bfloat16 else array).numpy()
    return array.astype(array.dtype.newbyteorder("<")).tobytes()
