import warnings

import pytest
import torch
from torch import nn

from triton_sparse_rnn import to_sparse
from triton_sparse_rnn.nn.weight_storage import (
    BLOCK_SIZES,
    choose_block_size,
    warn_if_dense,
    warn_if_slow,
    weight_names,
)
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("proj_size", [0, 2])
def test_names_are_those_of_torch_nn_in_its_order(num_layers, bias, bidirectional, proj_size):
    layer = nn.LSTM(3, 4, num_layers, bias=bias, bidirectional=bidirectional, proj_size=proj_size)
    assert weight_names(layer) == [name for name, _ in layer.named_parameters()]
    assert [name for k in range(num_layers) for name in weight_names(layer, k)] == weight_names(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize("density", [0, 0.02, 0.3, 1])
def test_no_listed_block_size_takes_fewer_bytes(dtype, density):
    weight = torch.randn(3 * 40, 50) * (torch.rand(3 * 40, 50) < density)
    chosen = choose_block_size(weight, 3, dtype)
    sizes = {size: BlockMatrix.from_dense(weight, size, gates=3, dtype=dtype).nbytes for size in BLOCK_SIZES}
    assert sizes[chosen] == min(sizes.values())


def test_blocks_do_not_reach_from_gate_to_gate():
    weight = torch.zeros(2 * 8, 4)
    weight[:8, 0], weight[8:, 1:] = 1, 1  # one full 16x4 block if rows were cut without regard to gates
    assert len(BlockMatrix.from_dense(weight, (16, 4), gates=2).values) == 2
    assert choose_block_size(weight, 1, torch.float32) == (16, 4)
    assert choose_block_size(weight, 2, torch.float32) == (16, 1)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (lambda i, j: i >= 0, r"weight_x is 0% zeros and 100% of its 4x2 blocks are stored.*prune it first"),
        (lambda i, j: (i + j) % 3 == 0, r"67% zeros and 100% .*do not fill blocks: prune with block_size=\(4, 2\)"),
        (lambda i, j: i < 4, None),
        (lambda i, j: i < 0, None),
    ],
)
def test_little_to_skip_is_said(kept, message):
    i, j = torch.meshgrid(torch.arange(8), torch.arange(6), indexing="ij")
    weight = kept(i, j).float()
    stored = BlockMatrix.from_dense(weight, (4, 2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_dense("weight_x", weight, stored)
    assert len(caught) == (message is not None)
    if message:
        with pytest.warns(UserWarning, match=message):
            warn_if_dense("weight_x", weight, stored)


def test_a_layer_without_a_kernel_is_named_with_the_reason():
    with pytest.warns(UserWarning, match=r"backend 'reference', .* because of x\. backend='reference' asks for this"):
        warn_if_slow("of x")


@pytest.mark.parametrize(
    ("cell", "options", "reason"),
    [
        (nn.LSTM, {}, "it runs GRU only in this version, this is LSTM"),
        (nn.GRU, {"weight_dtype": torch.int8}, "torch.int8"),
        (nn.GRU, {"block_size": (3, 1)}, "3 rows"),
        (nn.GRU, {}, None),
        (nn.LSTM, {"backend": "reference"}, None),
        (nn.GRU, {"backend": "cpu"}, None),
    ],
)
def test_a_fall_back_to_the_reference_is_said_unless_asked_for(cell, options, reason):
    layer = cell(4, 12).requires_grad_(False)
    for weight in (layer.weight_ih_l0, layer.weight_hh_l0):
        weight[:, 1:] = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        to_sparse(layer, **{"block_size": (4, 1), **options})
    said = [str(warning.message) for warning in caught]
    assert len(said) == (reason is not None), said
    if reason:
        assert said[0].startswith("the layer will run on backend 'reference', plain torch")
        assert reason in said[0]
