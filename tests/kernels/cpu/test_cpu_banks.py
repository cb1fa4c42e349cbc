"""Each way to pick from a bank that this processor has: every pick of every lane, and no bit is changed."""

import math

import pytest
import torch
from emitted_code import on_vectors

from triton_sparse_rnn.kernels.cpu import target
from triton_sparse_rnn.kernels.cpu.banks import BytePicker, MemoryPicker, picker
from triton_sparse_rnn.kernels.cpu.vector_code import INT8
from triton_sparse_rnn.sparse.picks import BANKS

ALL_PATHS = ["generic", "AVX2", "AVX-512"]
PATHS = ALL_PATHS[: ALL_PATHS.index(target.vector_path()) + 1]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize(("width", "quantized"), [(16, False), (32, True), (8, False), (5, True)])
def test_every_pick(path, bank, width, quantized, monkeypatch):
    monkeypatch.setattr(target, "vector_path", lambda: path)
    inputs = torch.randint(-128, 128, (bank,)).to(torch.int8) if quantized else special_floats(bank)
    picks = torch.stack([torch.arange(bank).roll(lane * 3) for lane in range(width)], dim=1).flatten()

    def emit(code, picks, inputs, index):
        way = picker(code, bank, quantized=quantized)
        assert isinstance(way, MemoryPicker) == (path == "generic" or width % 8 > 0)
        picked = way.pick(way.load_bank(inputs), way.load_picks(picks, index))
        return picked.to_floats() if quantized else picked

    picked, right = on_vectors(emit, width)(picks.to(torch.uint8), inputs), inputs[picks].float()
    assert torch.equal(picked.view(torch.int32), right.view(torch.int32))  # bits


def special_floats(count):
    """Among them NaN, infinities, -0.0 and a denormal, which reach only lanes that pick them."""
    numbers = torch.randn(count)
    numbers[:5] = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-42])
    return numbers


@pytest.mark.skipif(not target.permutes_bytes(), reason="this processor has no vpermb")
@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("width", [16, 32])
def test_every_pick_of_bytes(bank, width):
    inputs, lanes = torch.randint(-128, 128, (bank,)).to(torch.int8), 4 * width
    picks = torch.stack([torch.arange(bank).roll(lane * 3) for lane in range(lanes)], dim=1).flatten()

    def emit(code, like, picks, inputs, index):
        way = BytePicker(code, bank)
        return way.pick(way.load_bank(inputs), code.load_elements(picks, index * 4, INT8, 4)).as_floats()

    like = torch.empty(bank * width)
    picked = on_vectors(emit, width)(like, picks.to(torch.uint8), inputs).view(torch.int8)
    assert torch.equal(picked, inputs[picks])
