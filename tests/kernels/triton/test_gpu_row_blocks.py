import dataclasses
import itertools

import pytest
import torch
from gpu_device import DEVICE
from torch import Tensor

from triton_sparse_rnn.sparse import row_blocks as module
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.blocks import count_blocks, expand_block_mask
from triton_sparse_rnn.sparse.picks import Picks
from triton_sparse_rnn.sparse.row_blocks import RowBlocks, of_one_kind, row_blocks, stack_directions

BLOCK_SIZES = [(1, 1), (2, 3), (4, 1), (5, 2), (8, 1), (16, 1), (16, 4), (16, 5), (20, 1), (32, 1), (48, 2), (64, 64)]


def matrix_of(
    gates: int, H: int, C: int, block_size: tuple[int, int], density: float, dtype: torch.dtype = torch.float32
) -> BlockMatrix:
    """Random blocks, some of whose weights are 0, though they are stored."""
    kept = torch.rand(gates, *count_blocks(H, C, block_size)) < density
    weight = torch.randn(gates * H, C) * expand_block_mask(kept, block_size, H, C).flatten(0, 1)
    matrix = BlockMatrix.from_dense(weight, block_size, gates=gates, dtype=dtype)
    matrix.values.masked_fill_(torch.rand(matrix.values.shape) < 0.1, 0)
    tensors = {name: getattr(matrix, name).to(DEVICE) for name in ("values", "columns", "starts")}
    return dataclasses.replace(matrix, **tensors)


def read_in(matrix: BlockMatrix) -> Tensor:
    """True where a kernel reads the input of a weight: any of the 16 in its column and unit group is stored."""
    stored = dataclasses.replace(matrix, values=torch.ones_like(matrix.values)).to_dense() != 0
    by_gate = stored.unflatten(0, (matrix.gates, -1))
    parts = [part.any(1, keepdim=True).expand_as(part) for part in by_gate.split(16, dim=1)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def read_back(blocks: RowBlocks) -> tuple[Tensor, Tensor]:
    """The dense weights [D * G * H, C], and whose input is read."""
    C, rows = blocks.shape[1], blocks.starts.diff()
    row = torch.arange(len(rows), device=DEVICE).repeat_interleave(rows)
    weight = blocks.values.new_zeros(len(rows), C, 16)
    read = torch.zeros(weight.shape, dtype=torch.bool, device=DEVICE)
    place = row, blocks.columns.long()
    weight[place] = blocks.values
    read[place] = True

    def dense(parts: Tensor) -> Tensor:
        by_unit = parts.view(blocks.directions, blocks.groups, blocks.gates, C, 16).permute(0, 2, 1, 4, 3)
        return by_unit.flatten(2, 3)[:, :, : blocks.hidden_size].flatten(0, 2)

    return dense(weight), dense(read)


@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
def test_the_same_weights_are_stored_and_columns_of_16_are_read(
    block_size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", 500)
    torch.manual_seed(0)
    for H, C, gates, density in itertools.product((1, 16, 33, 40), (1, 5, 16), (1, 3), (0, 0.3, 1)):
        dtype = torch.bfloat16 if H == 33 else torch.float32
        matrix = matrix_of(gates, H, C, block_size, density, dtype)
        blocks = row_blocks(matrix)
        weight, read = read_back(blocks)
        assert torch.equal(weight, matrix.to_dense())
        assert torch.equal(read, read_in(matrix))
        assert blocks.values.dtype == dtype
        assert blocks.values.is_contiguous()
        assert (blocks.columns.dtype, blocks.starts.dtype) == (torch.int32, torch.int32)
        assert blocks.shape == matrix.shape
        assert blocks.gates == gates


def test_columns_ascend_within_a_row_of_blocks() -> None:
    blocks = row_blocks(matrix_of(3, 40, 30, (5, 3), 0.5))
    for first, end in itertools.pairwise(blocks.starts.tolist()):
        assert (blocks.columns[first:end].diff() > 0).all()


@pytest.mark.parametrize("block_size", [(16, 1), (16, 4)])
def test_blocks_of_16_rows_are_not_copied(block_size: tuple[int, int]) -> None:
    matrix = matrix_of(3, 33, 16, block_size, 0.5)
    assert row_blocks(matrix).values.data_ptr() == matrix.values.data_ptr()


def test_nan_and_infinity_stay() -> None:
    weight = torch.zeros(8, 3)
    weight[0, 0], weight[5, 2] = torch.nan, -torch.inf
    back, _ = read_back(row_blocks(BlockMatrix.from_dense(weight.to(DEVICE), (4, 1))))
    assert torch.equal(back.isnan(), weight.to(DEVICE).isnan())
    assert back[5, 2] == -torch.inf


def test_directions_lie_one_after_another() -> None:
    torch.manual_seed(0)
    whole, cut = matrix_of(3, 20, 9, (16, 1), 0.5), matrix_of(3, 20, 9, (4, 1), 0.5)
    stacked = stack_directions([row_blocks(whole), row_blocks(cut)])
    weight, read = read_back(stacked)
    assert stacked.directions == 2
    assert torch.equal(weight, torch.cat([whole.to_dense(), cut.to_dense()]))
    assert torch.equal(read, torch.cat([read_in(whole), read_in(cut)]))


def test_one_direction_is_not_copied() -> None:
    blocks = row_blocks(matrix_of(3, 20, 9, (16, 1), 0.5))
    assert stack_directions([blocks]) is blocks


PATTERNS = [Picks(), Picks(bank=8), Picks(rows=8, columns=2), Picks(rows=5, bank=64, columns=4), Picks(rows=32)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_picks_are_stored_and_read_as_they_are(pattern: Picks) -> None:
    torch.manual_seed(0)
    for H, C, gates, density in itertools.product((1, 16, 33, 40), (1, 5, 70), (1, 3), (0, 0.3, 1)):
        dtype = torch.bfloat16 if H == 33 else torch.float32
        weight = torch.randn(gates * H, C, device=DEVICE) * (torch.rand(gates * H, C, device=DEVICE) < density)
        matrix = BlockMatrix.from_dense(weight, pattern, gates=gates, dtype=dtype)
        entries = row_blocks(matrix)
        assert entries.is_picked
        assert (entries.shape, entries.gates, entries.weights.dtype) == (matrix.shape, gates, dtype)
        if dtype == torch.bfloat16:
            assert torch.equal(entries.values[..., 1].view(torch.int16).int(), entries.columns)
        lists = entries.starts.diff()
        row = torch.arange(len(lists), device=DEVICE).repeat_interleave(lists)
        back = entries.weights.new_zeros(len(lists), 16, C + 1)
        read = torch.zeros(back.shape, dtype=torch.int64, device=DEVICE)
        for entry, number in enumerate(row.tolist()):
            columns = entries.columns[entry].long()
            back[number].scatter_add_(1, columns, entries.weights[entry])
            read[number].scatter_add_(1, columns, torch.ones_like(columns))
        by_gate = [part.view(-1, gates, 16, C + 1).transpose(0, 1).flatten(1, 2) for part in (back, read)]
        weight, counts = (part[:, :H, :C].flatten(0, 1) for part in by_gate)
        assert torch.equal(weight, matrix.to_dense())
        assert not back[..., C].any()
        assert torch.equal(counts, places_read(matrix))


def places_read(matrix: BlockMatrix) -> Tensor:
    """How often each row of the matrix reads each column, padded places included: [rows, C]."""
    gates, groups, _ = matrix.block_grid
    (BR, _), (rows, C) = matrix.block_size, matrix.shape
    counts = torch.zeros(gates * groups * BR, C, dtype=torch.int64, device=DEVICE)
    group, gate = matrix.block_rows // gates, matrix.block_rows % gates
    row = (gate * groups + group)[:, None, None] * BR + torch.arange(BR, device=DEVICE)
    places = matrix.input_places()
    counts.index_put_((row.expand_as(places), places), torch.ones_like(places), accumulate=True)
    return counts.view(gates, -1, C)[:, : rows // gates].flatten(0, 1)


def test_a_vector_of_picks_keeps_to_a_bank() -> None:
    """So that 16 threads read four sectors of h."""
    pattern = Picks()
    weight = (
        torch.randn(32, 96) * pattern.spread(torch.rand(pattern.mask_shape(1, 32, 96)) < 0.2, torch.randn(1, 32, 96))[0]
    )
    entries = row_blocks(BlockMatrix.from_dense(weight.to(DEVICE), pattern))
    vectors = entries.columns.transpose(1, 2).flatten(0, 1)
    banks = vectors[(vectors < 96).all(1)] // 32
    assert len(banks) > 10
    assert torch.equal(banks.amin(1), banks.amax(1))


def test_directions_of_which_one_is_in_picks_are_all() -> None:
    torch.manual_seed(0)
    blocks = row_blocks(matrix_of(3, 20, 9, (16, 1), 0.5, torch.float16))
    matrix = BlockMatrix.from_dense(torch.randn(60, 9).to(DEVICE), Picks(), gates=3, dtype=torch.float16)
    stacked = stack_directions([blocks, row_blocks(matrix)])
    assert stacked.is_picked
    (first, second) = of_one_kind([blocks, row_blocks(matrix)])
    assert torch.equal(stacked.values, torch.cat([first.values, second.values]))
    number = torch.arange(len(blocks.columns), device=DEVICE)
    row = torch.arange(len(blocks.starts) - 1, device=DEVICE).repeat_interleave(blocks.starts.diff())
    number -= blocks.starts[row]
    entry, vector = first.starts[row] + number // 4, number % 4
    assert torch.equal(first.weights[entry, :, vector], blocks.values)
    assert torch.equal(first.columns[entry, :, vector], blocks.columns[:, None].expand(-1, 16))
    assert first.weights.count_nonzero() == blocks.values.count_nonzero()
