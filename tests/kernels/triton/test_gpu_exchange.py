from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from gpu_device import DEVICE
from torch import Tensor

from triton_sparse_rnn.kernels.triton.exchange import (
    FAILED,
    INTERPRETED,
    NAN,
    SENTINEL,
    new_exchange,
    publish,
    read_when_ready,
)

H, B = 11, 3
WORDS = tl.constexpr(128)  # that a program of one warp reads: four a thread


@triton.jit
def publish_words(exchange_ptr, h_ptr, count):
    offs = tl.arange(0, 16)
    publish(exchange_ptr + offs, tl.load(h_ptr + offs), offs < count)


@triton.jit
def read_words(
    exchange_ptr,
    columns_ptr,
    words_ptr,
    stride_bytes,
    status_ptr,
    spin_limit,
    PACK: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    offs = tl.reshape(tl.arange(0, WORDS), (2, 4, WORDS // 8))
    columns = tl.load(columns_ptr + offs)
    h = read_when_ready(exchange_ptr, columns, stride_bytes, status_ptr, spin_limit, PACK, PORTABLE)
    tl.store(words_ptr + offs, h.to(tl.int32, bitcast=True))


def read(slot: Tensor, columns: Tensor, b: int, status: Tensor, spin_limit: int, PACK: int = 1) -> Tensor:
    """The words of row b of the batch."""
    words = torch.zeros_like(columns)
    constants: dict[str, Any] = {"PACK": PACK, "PORTABLE": INTERPRETED, "num_warps": 1}
    read_words[(1,)](slot[:, b:], columns, words, slot.stride(0) * 4, status, spin_limit, **constants)
    return words


def random_slot() -> Tensor:
    slot = torch.randn(H + 1, B, device=DEVICE).view(torch.int32)
    slot[H] = 0
    return slot


def random_columns() -> Tensor:
    return torch.randint(0, H + 1, (WORDS.value,), dtype=torch.int32, device=DEVICE)


def new_status(value: int = 0) -> Tensor:
    return torch.full((1,), value, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(("D", "S", "H", "B"), [(1, 1, 1, 1), (1, 3, 16, 1), (2, 2, 5, 3), (2, 6, 40, 13)])
def test_a_new_exchange_is_sentinels_and_a_row_of_zeros(D: int, S: int, H: int, B: int):
    exchange = new_exchange(D, S, H, B, DEVICE)
    assert exchange.shape == (D, S + 1, H + 1, B)
    assert exchange.dtype == torch.int32
    assert exchange.device.type == DEVICE.type
    assert (exchange[:, :, :H] == SENTINEL.value).all()
    assert (exchange[:, :, H] == 0).all()


def test_a_word_that_is_published_is_never_the_sentinel():
    nans = [-1, NAN.value, -0x400000, 0x7F800001, 0x7FFFFFFF, -0x7FFFFF]  # of both signs, quiet and signalling
    numbers = [0, -(2**31), 1, 0x3F800000, 0x7F7FFFFF, 0x7F800000, -0x800000]  # 0 -0 tiny 1 largest inf -inf
    h = torch.tensor([*nans, *numbers, 0, 0, 0], dtype=torch.int32, device=DEVICE)
    exchange = torch.full((16,), SENTINEL.value, dtype=torch.int32, device=DEVICE)
    publish_words[(1,)](exchange, h.view(torch.float32), 13)
    assert exchange.tolist() == [*[NAN.value] * 6, *numbers, *[SENTINEL.value] * 3]


@pytest.mark.parametrize("b", range(B))
@pytest.mark.parametrize("PACK", [1, 2, 4])
def test_words_that_are_there_are_read_as_they_are(PACK: int, b: int):
    slot, columns, status = random_slot(), random_columns(), new_status()
    slot[:3, b] = torch.tensor([NAN.value, 0x7F800000, -(2**31)], dtype=torch.int32)
    assert torch.equal(read(slot, columns, b, status, 1, PACK), slot[columns.long(), b])
    assert status.item() == 0


@pytest.mark.parametrize("PACK", [1, 4])
def test_a_wait_for_a_word_that_never_comes_ends_and_is_told(PACK: int):
    slot, columns, status = random_slot(), random_columns(), new_status()
    slot[5, 1] = SENTINEL.value
    columns[:3] = 5
    words = read(slot, columns, 1, status, 200, PACK)
    assert torch.equal(words, slot[columns.long(), 1])
    assert words[:3].view(torch.float32).isnan().all()
    assert status.item() == FAILED.value


def test_nobody_waits_to_the_bound_after_another_wait_has_failed():
    slot, columns, status = random_slot(), random_columns(), new_status(value=7)
    slot[5] = SENTINEL.value
    columns[0] = 5
    read(slot, columns, 0, status, 5000)
    assert status.item() == 7  # which a wait to the bound would have overwritten
