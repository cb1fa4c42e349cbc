import pytest
import torch
from gpu_layers import Layer, assert_close

from triton_sparse_rnn.kernels.triton.exchange import BETWEEN, NONE
from triton_sparse_rnn.kernels.triton.streamed import choose_streamed_tile
from triton_sparse_rnn.sparse.layer_config import GATES

ODD = (5, 3)  # rows and columns of blocks that do not fit into columns of 16


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("mode", GATES)
def test_step_by_step(mode: str, D: int) -> None:
    layer = Layer(mode, 20, [3, 2, 1], D=D)
    assert_close(layer.streamed(), layer.exact())


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("mode", GATES)
def test_one_program_exchanges_h_with_itself(mode: str, D: int) -> None:
    layer = Layer(mode, 13, [5, 3, 2, 1], D=D)  # two slices of the batch
    assert_close(layer.streamed(steps=3), layer.exact())


@pytest.mark.parametrize("mode", GATES)
def test_single_step_with_its_input(mode: str) -> None:
    layer = Layer(mode, 20, [3], D=2)
    assert_close(layer.streamed(fused=True, ragged=False), layer.exact())


@pytest.mark.parametrize("steps", [None, 3])
def test_a_rectangle_needs_no_lengths(steps: int | None) -> None:
    layer = Layer("GRU", 16, [3, 3, 3], D=2)
    assert_close(layer.streamed(steps=steps, ragged=False), layer.exact())


@pytest.mark.parametrize("H", [1, 15, 16, 17, 48])
def test_every_remainder_of_a_unit_group(H: int) -> None:
    layer = Layer("LSTM", H, [2, 1], block_ih=ODD, block_hh=ODD)
    assert_close(layer.streamed(), layer.exact())


@pytest.mark.parametrize("B", [1, 2, 4, 9, 17])
def test_every_tile(B: int) -> None:
    layer = Layer("GRU", 20, [B])
    assert_close(layer.streamed(fused=True), layer.exact())


@pytest.mark.parametrize("B", [1, 2, 5])
def test_infinity_is_read_by_a_column_of_16_that_is_stored_in_part(B: int) -> None:
    layer = Layer("GRU", 13, [B, B], block_ih=ODD, block_hh=ODD)
    layer.h[0, 0, 3] = torch.inf
    exact = layer.exact()
    assert exact[0].isnan().any()
    assert not exact[0].isnan().all()
    assert_close(layer.streamed(), exact)
    assert_close(layer.streamed(steps=2), exact)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_no_block_and_all_blocks(density: float) -> None:
    layer = Layer("RNN_TANH", 16, [2, 2], density=density)
    assert_close(layer.streamed(), layer.exact())
    assert_close(layer.streamed(steps=2), layer.exact())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights(dtype: torch.dtype) -> None:
    layer = Layer("LSTM", 15, [2, 2], dtype=dtype)
    assert_close(layer.streamed(), layer.exact())
    assert_close(layer.streamed(steps=2), layer.exact())


@pytest.mark.parametrize("steps", [None, 2])
def test_more_columns_than_a_program_reads_at_a_time(steps: int | None) -> None:
    layer = Layer("GRU", 150 if steps is None else 16, [1, 1], I=300, density=1.0)
    assert_close(layer.streamed(steps=steps), layer.exact())


@pytest.mark.parametrize("bits", [-1, 0x7FC00000])
def test_a_nan_in_h0_travels_whatever_its_bits(bits: int) -> None:
    layer = Layer("GRU", 13, [2, 2, 2], density=0.1)
    layer.h.view(torch.int32)[0, 1, 4] = bits
    exact = layer.exact()
    assert exact[0].isnan().any()
    assert_close(layer.streamed(steps=3), exact)
    assert_close(layer.streamed(), exact)


def test_nan_and_infinity_in_x_travel_along_stored_weights() -> None:
    layer = Layer("RNN_TANH", 20, [3])
    stored = layer.weights[0].weight_ih.to_dense()[:16].any(dim=0)  # type: ignore[union-attr]
    layer.x[0, stored.nonzero()[0]], layer.x[2, stored.nonzero()[-1]] = torch.nan, torch.inf
    exact = layer.exact()
    assert exact[0].isnan().any()
    assert not exact[0].isnan().all()
    assert_close(layer.streamed(fused=True), exact)


@pytest.mark.parametrize("mode", [NONE, BETWEEN])
def test_tiles_hold_the_batch_or_are_the_largest(mode: int) -> None:
    tiles = [choose_streamed_tile(B, getattr(mode, "value", mode)) for B in range(1, 100)]
    assert all(tile.rows >= B or tile.rows == tiles[-1].rows for B, tile in enumerate(tiles, 1))
    assert not any(tile.dot and mode is BETWEEN for tile in tiles)
