"""The formula of the estimate, what is counted for it, and that it is called an estimate."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from gpu_compilation import without_interpreter

from tools import estimate
from tools.estimate import Estimate
from triton_sparse_rnn.kernels.triton.packing import longest_list
from triton_sparse_rnn.kernels.triton.tiles import Residency, ResidentTile, choose_residency
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.patterns import Blocks, Pattern
from triton_sparse_rnn.sparse.picks import Picks
from triton_sparse_rnn.sparse.row_blocks import row_blocks

TILE = ResidentTile(slots=4, itemsize=4, num_warps=4, ko=1, tiles=4, registers=96)
FOUND = Estimate(
    Residency(TILE, 2, programs=64, directions=1, slices=1, resident_slices=1),
    registers=90, instructions=301, loads=2, barriers=2, shuffles=5, sectors=100, programs=2,
)  # fmt: skip


def test_the_largest_of_three_bounds_is_told():
    assert FOUND.cycles == (602, 100, 530)  # 2 * 4 * 301 / 4, 2 * 100 * 32 / 64
    assert FOUND.cells()[-4:] == ["602", "100", "530", "602"]
    assert FOUND.cells()[0] == "64 x 16 units x 16 columns, 4 warps"
    assert dataclasses.replace(FOUND, instructions=100, sectors=9).cells()[-1] == "530"
    alone = dataclasses.replace(FOUND, choice=dataclasses.replace(FOUND.choice, programs=1))
    assert alone.cycles == (602, 100, 0)


@pytest.mark.parametrize("pattern", estimate.PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layers_are_balanced(pattern, dtype):
    blocks = estimate.random_layer(64, dtype, pattern)
    assert blocks.weights.dtype == dtype
    assert blocks.is_picked == isinstance(pattern, Picks)
    counts = blocks.starts.diff()
    assert counts.max() - counts.min() <= 1
    assert longest_list(blocks) in (6, 7, 8)  # a tenth of 64, or in whole entries


def sectors_of(weight: torch.Tensor, pattern: Pattern, dtype: torch.dtype = torch.float32) -> int:
    """Of a GRU's weights [3, H, H], whose programs hold 16 units each."""
    blocks = row_blocks(BlockMatrix.from_dense(weight.flatten(0, 1), pattern, gates=3, dtype=dtype))
    choice = choose_residency(
        "GRU", weight.shape[1], longest_list(blocks), dtype.itemsize, picked=blocks.is_picked, chains_wait=True
    )
    assert choice is not None
    return estimate.sectors(blocks, choice)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sectors_that_a_warp_reads_at_once_count_once(dtype):
    """Lists of one column are filled up with row 32, which is in sector 4; a GRU's slot 3 reads nothing else."""
    weight = torch.zeros(3, 32, 32)
    weight[:, :, 9] = 1.0
    loads = 4  # of a slot, in blocks of a tile's rows and in picks of an entry's vectors
    assert sectors_of(weight, Blocks(16, 1), dtype) == 3 * (2 + loads - 1) + loads
    assert sectors_of(weight, Picks(), dtype) == 3 * (2 + loads - 1) + loads
    weight.zero_()
    weight[:, torch.arange(32), torch.arange(32)] = 1.0  # of 16 units in a vector, each in a column of its own
    assert sectors_of(weight, Picks(), dtype) == 3 * (3 + loads - 1) + loads


def test_a_layer_that_does_not_stay_on_chip_has_none():
    assert estimate.estimate(3072, torch.float32, Picks(), 90) is None


def test_the_table_is_called_an_estimate(monkeypatch, capsys):
    monkeypatch.setattr(estimate, "uncompilable", lambda: None)
    monkeypatch.setattr(estimate, "estimate", lambda H, *_: None if H > 2048 else FOUND)
    assert estimate.main(["--markdown"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("An estimate from machine code, not a measurement.")
    assert (
        "| 512 | float32 | blocks | 64 x 16 units x 16 columns, 4 warps | 90 | 301 | 2 | 100 | 2 | 5 | 602 | "
        in printed
    )
    assert "| 2,560 | bfloat16 | picks | streamed | - |" in printed
    assert estimate.main([]) == 0
    monkeypatch.setattr(estimate, "uncompilable", lambda: "no compiler")
    assert estimate.main([]) == 2
    assert capsys.readouterr().err == "kernels cannot be compiled here: no compiler\n"


ESTIMATES = """
import json, torch
from tools.estimate import PATTERNS, estimate
found = [estimate(512, torch.float32, pattern, 90) for pattern in PATTERNS]
print(json.dumps([[f.instructions, f.loads, f.sectors, f.barriers, f.shuffles] for f in found]))
"""


@pytest.mark.slow("compiler")
def test_blocks_and_picks_are_counted():
    command = [sys.executable, "-c", ESTIMATES]
    result = subprocess.run(command, env=without_interpreter(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    blocks, picks = json.loads(result.stdout)
    assert 4 * blocks[1] > picks[1] > 3 * blocks[1]  # a load for each weight of a thread, not for four
    assert picks[0] - blocks[0] > 3 * (picks[1] - blocks[1])  # what a load takes: where from, asking, waiting
    assert picks[2] > 3 * blocks[2]
    assert all(count > 0 for count in blocks + picks)
