"""The pack kernel alone, bit for bit, against the order of pack.py and the rounding of ops/backends/reference.py."""

import math

import pytest
import torch
from emitted_code import call_kernel
from torch.nn import functional as F

from triton_sparse_rnn.kernels.cpu.pack import PackFields, PackFormat
from triton_sparse_rnn.ops.backends.reference import quantize_activations

FORMATS = [
    PackFormat(tile_rows=8, quad=1, quantized=False, offset=0),
    PackFormat(tile_rows=8, quad=4, quantized=True, offset=128),
    PackFormat(tile_rows=8, quad=1, quantized=True, offset=128),
    PackFormat(tile_rows=4, quad=1, quantized=True, offset=0),
    PackFormat(tile_rows=1, quad=1, quantized=True, offset=7),
]
ROOM = 3  # floats between rows of the source


def pack(layout, rows, padded):
    """Return what the kernel leaves in target and scales, with what stands behind them."""
    columns = rows.shape[1]
    source = torch.full((len(rows), columns + ROOM), math.nan)
    source[:, :columns] = rows
    size = padded * len(rows)
    target = torch.full((size + 8,), -99, dtype=torch.int8 if layout.quantized else torch.float32)
    scales = torch.full((len(rows) + 1,), -99.0)
    addresses = source.data_ptr(), 4 * (columns + ROOM), target.data_ptr(), scales.data_ptr()
    call_kernel(layout, PackFields(columns, padded, *addresses), 0, len(rows))
    assert (target[size:] == -99).all()
    assert scales[-1] == -99
    return target[:size], scales[:-1]


def tiles(layout, rows):
    """The same numbers, [n, padded], in the order that the top of pack.py draws."""
    parts, first, size = [], 0, layout.tile_rows
    while size:
        while len(rows) - first >= size:
            tile = rows[first : first + size].unflatten(1, (-1, layout.quad))
            parts.append(tile.transpose(0, 1).flatten())
            first += size
        size //= 2
    return torch.cat(parts)


def expected(layout, rows, padded):
    """Target and scales of finite rows."""
    filled = F.pad(rows, (0, padded - rows.shape[1]))
    if not layout.quantized:
        return tiles(layout, filled), torch.full((len(rows),), -99.0)
    numbers, scales = quantize_activations(filled)
    stored = (numbers.to(torch.int32) + layout.offset).to(torch.uint8).view(torch.int8)
    return tiles(layout, stored), scales.flatten()


@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_order_and_numbers_of_every_shape(layout):
    """The columns are every remainder of 16 and 4, and the rows every mixture of tiles."""
    for rows in range(1, 20):
        for columns in (1, 2, 3, 4, 5, 12, 15, 16, 17, 29, 30, 31, 32, 33, 50):
            numbers = torch.randn(rows, columns) * 10.0 ** torch.randint(-20, 20, (rows, 1))
            for padded in (-(-columns // 4) * 4, -(-columns // 48) * 48):
                target, scales = pack(layout, numbers, padded)
                right_target, right_scales = expected(layout, numbers, padded)
                assert torch.equal(target, right_target)
                assert torch.equal(scales, right_scales)


def test_ties_go_to_the_even_number():
    layout = FORMATS[1]
    halves = torch.cat([torch.arange(-127, 127) + 0.5, torch.tensor([127.0, 0.0])])[None]
    target, scales = pack(layout, halves, 256)
    assert scales.tolist() == [1.0]
    numbers = target.view(torch.uint8).int() - 128
    assert numbers.tolist() == halves[0].round().int().tolist()  # of torch, which rounds to even
    assert (numbers[:254] % 2 == 0).all()


@pytest.mark.parametrize("layout", FORMATS[1:], ids=str)
@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-40, 1.4e-36, 1.5e-36, 1e-33, 1e-30, 1e-20, 1e20, 3.4e38])
def test_tiny_and_huge_rows(layout, largest):
    """From zeros and denormals, whose scale has no reciprocal, to the largest numbers."""
    rows = torch.rand(5, 40).sub(0.5) * largest
    rows[:, 7] = -largest
    rows[3] = 1.0  # the rows of a tile do not share a scale
    target, scales = pack(layout, rows, 48)
    right_target, right_scales = expected(layout, rows, 48)
    assert torch.equal(scales, right_scales)
    assert torch.equal(target, right_target)


@pytest.mark.parametrize("layout", FORMATS[1:], ids=str)
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, 15, 16, 33])
def test_what_is_not_finite_makes_the_scale_of_its_row_nan(layout, value, column):
    rows = torch.randn(9, 34)
    right_target, right_scales = expected(layout, rows, 48)
    rows[4, column] = value
    target, scales = pack(layout, rows, 48)
    assert scales.isnan().tolist() == [row == 4 for row in range(9)]
    assert torch.equal(scales[scales.isfinite()], right_scales[scales.isfinite()])
    if layout.tile_rows < 8:  # rows in tiles of their own lie apart
        assert torch.equal(target[: 4 * 48], right_target[: 4 * 48])


def test_what_is_not_quantised_keeps_its_bits():
    rows = torch.tensor([[math.nan, math.inf, -0.0, 1e-45, -math.inf]]).repeat(3, 1)
    target, _ = pack(FORMATS[0], rows, 8)
    right, _ = expected(FORMATS[0], rows, 8)
    assert torch.equal(target.view(torch.int32), right.view(torch.int32))
