"""Weights in narrow dtypes: exactly what is stored counts, whether the processor or plain integer code decodes it."""

import math

import pytest
import torch
from cpu_layers import RAGGED, Layer, assert_as_accurate_as_torch
from emitted_code import on_vectors
from llvmlite import ir

from triton_sparse_rnn.kernels.cpu import target
from triton_sparse_rnn.kernels.cpu.stored_weights import BlockFormat, load_integers, load_weights
from triton_sparse_rnn.kernels.cpu.vector_code import VectorCode
from triton_sparse_rnn.sparse.picks import Picks

NARROW = [torch.float16, torch.bfloat16, torch.int8]
CELLS = [("GRU", "RNN_TANH"), ("LSTM", "RNN_RELU"), ("LSTM projected", "GRU")]  # with blocks of each kind
BLOCKS = [(16, 4), (5, 3)]
PICKS = [Picks(16, 32, 2), Picks(8, 16)]


@pytest.mark.parametrize(("dtype", "modes"), list(zip(NARROW, CELLS, strict=True)), ids=str)
@pytest.mark.parametrize("patterns", [BLOCKS, PICKS], ids=["blocks", "picks"])
def test_layers_are_as_accurate_as_with_wide_weights(dtype, modes, patterns):
    """Against float64 with the weights that are stored."""
    for mode, block_hh, block_ih in zip(modes, patterns, reversed(patterns), strict=True):
        for I, H, bias in ((21, 53, True), (32, 48, False), (1, 1, True)):
            layer = Layer(mode, I, H, block_ih, block_hh, bias=bias, dtype=dtype)
            assert_as_accurate_as_torch(layer, [9, 8, 4, 3, 2, 1])
            assert_as_accurate_as_torch(layer, [1, 1], rectangular=True)


@pytest.mark.parametrize(("dtype", "modes"), list(zip(NARROW, CELLS, strict=True)), ids=str)
def test_dense_input_weight_beside_narrow_ones(dtype, modes):
    assert_as_accurate_as_torch(Layer(modes[0], 21, 37, None, BLOCKS[0], dtype=dtype), RAGGED)


def every_half():
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)


@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_number_of_two_bytes_is_decoded_exactly(dtype, portable, monkeypatch):
    """Denormals, infinities, NaNs and -0.0 among them."""
    monkeypatch.setattr(target, "converts_half", lambda: not portable and "f16c" in target.features())
    weights = every_half().view(dtype)
    name = str(dtype).removeprefix("torch.")
    decoded = on_vectors(lambda code, values, index: load_weights(code, name, values, index), 16)(weights)
    assert torch.equal(decoded.isnan(), weights.isnan())
    numbers = ~weights.isnan()
    assert torch.equal(decoded[numbers].view(torch.int32), weights.float()[numbers].view(torch.int32))  # bits


@pytest.mark.parametrize("width", [1, 3, 5, 16, 32])
def test_every_byte_is_decoded_exactly(width):
    weights = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).repeat(width)
    decoded = on_vectors(lambda code, values, index: load_weights(code, "int8", values, index), width)(weights)
    assert torch.equal(decoded, weights.float())
    integers = on_vectors(lambda code, values, index: load_integers(code, values, index).to_floats(), width)(weights)
    assert torch.equal(integers, weights.float())


def test_the_portable_way_needs_no_half_type(monkeypatch):
    """Where there is no instruction, LLVM would call a function that may not exist."""
    monkeypatch.setattr(target, "converts_half", lambda: False)
    module = emitted_module(lambda code, values, index: load_weights(code, "float16", values, index))
    assert "half" not in module
    assert "shl" in module


def emitted_module(function):
    module = ir.Module()
    kernel = ir.Function(module, ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 3), "kernel")
    builder = ir.IRBuilder(kernel.append_basic_block())
    code = VectorCode(builder, 16)
    values, target_address, index = map(code.index, kernel.args)
    code.store(function(code, values, index), target_address, index)
    builder.ret_void()
    return str(module)


def test_a_column_of_a_block_is_cut_into_whole_vectors():
    for BR in range(1, 200):
        layout = BlockFormat(BR, 1, "float32")
        assert layout.width * layout.parts == BR
        assert layout.width <= 32
        assert layout.width == BR or BR > 32
        assert BR % 16 or layout.width % 16 == 0 or BR <= 32  # whole registers where they fit


@pytest.mark.parametrize("path", ["AVX-512", "AVX2", "generic"])
@pytest.mark.parametrize("BR", [1, 4, 7, 8, 16, 20, 32, 48])
@pytest.mark.parametrize("bank", [0, 8, 32, 64])
def test_tiles_leave_registers_for_weights(path, BR, bank, monkeypatch):
    """Of the bank of each row of a tile, too, where an instruction permutes registers."""
    monkeypatch.setattr(target, "vector_path", lambda: path)
    layout = BlockFormat(BR, 1, "float32", bank=bank)
    lanes, registers = {"AVX-512": (16, 32), "AVX2": (8, 16), "generic": (4, 16)}[path]
    tile = layout.tile_rows
    assert tile in (1, 2, 4, 8)
    if bank and lanes >= 8 and layout.width % 8 == 0:
        assert tile == 1 or tile * (layout.width + bank) / lanes <= registers * 3 / 4
    else:
        assert tile == 1 or tile * math.ceil(layout.width / lanes) <= registers // 2


@pytest.mark.parametrize(
    ("BR", "BC", "quantized", "vnni", "quad"),
    [
        (16, 4, True, True, 4),
        (16, 1, True, True, 1),
        (48, 8, True, True, 4),
        (32, 6, True, True, 1),
        (8, 4, True, True, 1),
        (16, 4, True, False, 1),
        (16, 4, False, True, 1),
    ],
)
def test_quads_need_sixteen_rows_four_columns_and_the_instruction(BR, BC, quantized, vnni, quad, monkeypatch):
    monkeypatch.setattr(target, "multiplies_bytes", lambda: vnni)
    layout = BlockFormat(BR, BC, "int8", quantized)
    assert layout.quad == quad
    assert layout.multiplies_quads == (quantized and vnni and BR % 16 == 0)
    for vbmi in (True, False):  # picks in quads, whose bytes an instruction permutes
        monkeypatch.setattr(target, "permutes_bytes", lambda vbmi=vbmi: vbmi)
        picked = BlockFormat(BR, BC, "int8", quantized, 64)
        assert picked.multiplies_quads == (vbmi and BC == 4 and layout.multiplies_quads)
        assert picked.quad == 1
