import dataclasses

import pytest
import torch
from gpu_device import DEVICE
from gpu_layers import assert_close, in_columns_of_16, random_matrix
from torch import Tensor

from triton_sparse_rnn.kernels.triton.block_product import (
    PICKED_TILES,
    TILES,
    block_product,
    choose_product_tile,
    project_inputs,
)
from triton_sparse_rnn.kernels.triton.exchange import INTERPRETED
from triton_sparse_rnn.ops.backends.reference import block_linear
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.picks import Picks
from triton_sparse_rnn.sparse.row_blocks import row_blocks, stack_directions

FLOAT32, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16


def exact_product(x: Tensor, matrix: BlockMatrix) -> Tensor:
    """W x in float64; what is not stored does not read its input."""
    if matrix.is_picked:
        return block_linear(matrix, None, torch.float64)(x.double())
    stored = dataclasses.replace(matrix, values=torch.ones_like(matrix.values)).to_dense() != 0
    products = x.double()[:, None, :] * matrix.to_dense().double()
    return products.masked_fill(~stored, 0).sum(-1)


@pytest.mark.parametrize(
    ("gates", "H", "C", "pattern", "density", "weight_dtype", "x_dtype", "N"),
    [
        (3, 17, 5, (16, 1), 0.5, FLOAT32, FLOAT32, 1),
        (3, 33, 300, (16, 1), 0.7, FLOAT32, FLOAT32, 2),
        (4, 16, 140, (8, 2), 0.5, FLOAT32, BFLOAT, 3),
        (1, 40, 40, (16, 1), 0.5, HALF, FLOAT32, 5),
        (1, 40, 300, (4, 1), 0.2, FLOAT32, FLOAT32, 1),
        (3, 40, 40, (16, 4), 0.5, BFLOAT, BFLOAT, 8),
        (3, 40, 70, (16, 1), 0.9, BFLOAT, FLOAT32, 9),
        (4, 30, 20, (7, 3), 0.9, FLOAT32, FLOAT32, 20),
        (4, 40, 70, (16, 3), 0.9, HALF, HALF, 33),
        (3, 20, 40, (16, 3), 0.0, HALF, HALF, 33),
        (3, 20, 70, (16, 3), 1.0, FLOAT32, FLOAT32, 70),
        (1, 20, 70, (16, 3), 1.0, FLOAT32, FLOAT32, 130),
        (1, 1, 1, (1, 1), 1.0, FLOAT32, FLOAT32, 2),
        (3, 20, 40, (16, 3), 0.5, HALF, HALF, 0),
        (3, 33, 300, Picks(), 0.2, FLOAT32, FLOAT32, 1),
        (1, 40, 300, Picks(bank=8), 0.5, BFLOAT, FLOAT32, 2),
        (4, 30, 20, Picks(rows=8, bank=16, columns=2), 0.9, HALF, HALF, 5),
        (3, 40, 70, Picks(bank=64, columns=4), 0.1, FLOAT32, BFLOAT, 9),
        (4, 17, 33, Picks(rows=7), 1.0, BFLOAT, BFLOAT, 70),
        (3, 20, 40, Picks(), 0.0, FLOAT32, FLOAT32, 3),
    ],
)
def test_products(
    gates: int,
    H: int,
    C: int,
    pattern: tuple[int, int] | Picks,
    density: float,
    weight_dtype: torch.dtype,
    x_dtype: torch.dtype,
    N: int,
) -> None:
    torch.manual_seed(0)
    matrix = random_matrix(gates, H, C, pattern, density, weight_dtype)
    weight, bias = row_blocks(matrix), torch.randn(gates * H, device=DEVICE)
    x = torch.randn(N, C + 3, device=DEVICE).to(x_dtype)[:, 1 : C + 1]
    exact = exact_product(x, matrix)
    out = torch.full((N, gates * H + 2), torch.nan, device=DEVICE)
    y = block_product(x, weight, bias, out[:, 1:-1])
    assert y.data_ptr() == out[:, 1:-1].data_ptr()
    # Tensor cores cut off where a sum in float32 is rounded.
    tolerance = 1e-5 if x_dtype == weight_dtype != FLOAT32 and not INTERPRETED else 3e-6
    assert_close([y, block_product(x, weight)], [exact + bias, exact], tolerance)
    assert out[:, [0, -1]].isnan().all(), "written beside"


@pytest.mark.parametrize("pattern", [(16, 1), Picks()], ids=["blocks", "picks"])
@pytest.mark.parametrize("N", [3, 18])
@pytest.mark.parametrize("gates", [1, 3, 4])
def test_gates_go_to_their_slots_in_all_directions(gates: int, N: int, pattern: tuple[int, int] | Picks) -> None:
    torch.manual_seed(0)
    H, C, slots = 19, 40, {1: [0], 3: [0, 1, 3], 4: [0, 1, 2, 3]}[gates]
    matrices = [random_matrix(gates, H, C, pattern), random_matrix(gates, H, C)]
    bias = torch.randn(2, H, slots[-1] + 1, device=DEVICE)
    sums = torch.full((N, *bias.shape), torch.nan, device=DEVICE)
    x = torch.randn(N, C, device=DEVICE)
    project_inputs(x, stack_directions([row_blocks(matrix) for matrix in matrices]), bias, sums)
    exact = bias.double().expand_as(sums).clone()
    for d, matrix in enumerate(matrices):
        exact[:, d, :, slots] += exact_product(x, matrix).view(N, gates, H).transpose(1, 2)
    assert_close([sums], [exact])


@pytest.mark.parametrize("pattern", [(16, 1), (4, 1), Picks()])
@pytest.mark.parametrize("N", [2, 17])
def test_nan_and_infinity_travel_along_stored_weights_only(pattern: tuple[int, int] | Picks, N: int) -> None:
    torch.manual_seed(0)
    matrix = random_matrix(3, 24, 20, pattern, 0.3)
    x = torch.randn(N, 20, device=DEVICE)
    x[0, 3], x[-1, 7], x[-1, 11] = torch.nan, torch.inf, -torch.inf
    exact = exact_product(x, in_columns_of_16(matrix))
    assert not exact.isfinite().all()
    assert exact.isfinite().any(dim=1).all()
    assert_close([block_product(x, row_blocks(matrix))], [exact])


@pytest.fixture
def _room() -> None:
    if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < 2**35:
        pytest.skip("needs 32 GB of a GPU")


@pytest.mark.usefixtures("_room")
@pytest.mark.parametrize("block_size", [(16, 1), (8, 1)])
def test_offsets_of_rows_pass_2_to_the_31(block_size: tuple[int, int]) -> None:
    """In memory that is mapped but hardly touched."""
    torch.manual_seed(0)
    matrix, N, stride = random_matrix(1, 16, 4, block_size, 0.7), 18, 2**27 + 64
    x = torch.empty(N * stride, dtype=torch.float16, device=DEVICE).as_strided((N, 4), (stride, 1))
    y = torch.empty(N * stride, device=DEVICE).as_strided((N, 16), (stride, 1))
    x.copy_(torch.randn(N, 4))
    assert_close([block_product(x, row_blocks(matrix), None, y)], [exact_product(x, matrix)])


@pytest.mark.usefixtures("_room")
@pytest.mark.parametrize("N", [1, 16])
def test_offsets_of_weights_pass_2_to_the_31(N: int) -> None:
    torch.manual_seed(0)
    matrix, unused = random_matrix(1, 16, 40), 2**27 + 5
    blocks = row_blocks(matrix)
    values = torch.empty(unused + len(blocks.values), 16, dtype=torch.float16, device=DEVICE)
    columns = torch.empty(len(values), dtype=torch.int32, device=DEVICE)
    values[unused:], columns[unused:] = blocks.values, blocks.columns
    rounded = dataclasses.replace(matrix, values=matrix.values.half())
    x = torch.randn(N, 40, device=DEVICE)
    y = block_product(x, blocks._replace(values=values, columns=columns, starts=blocks.starts + unused))
    assert_close([y], [exact_product(x, rounded)])


def test_the_smallest_tile_that_holds_all_rows_is_chosen() -> None:
    chosen = [choose_product_tile(rows) for rows in range(1, 200)]
    assert all(tile.rows >= rows or tile.rows == chosen[-1].rows for rows, tile in enumerate(chosen, 1))
    assert [tile.rows for tile in chosen] == sorted(tile.rows for tile in chosen)
    assert set(TILES) == set(chosen)
    assert {choose_product_tile(rows, picked=True) for rows in range(1, 200)} == set(PICKED_TILES)
    assert not any(tile.dot for tile in PICKED_TILES)
