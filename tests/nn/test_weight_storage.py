import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from triton_sparse_rnn import to_sparse
from triton_sparse_rnn.nn import weight_storage
from triton_sparse_rnn.nn.weight_storage import (
    BLOCK_SIZES,
    break_even_text,
    choose_block_size,
    from_buffers,
    store_weights,
    to_buffers,
    warn_if_dense,
    warn_if_slow,
    weight_names,
    weight_shape,
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
        (lambda i, j: i >= 0, r"weight_x is 0% zeros and 100% of its 4x2 blocks .* runs as a dense product; prune it"),
        (lambda i, j: (i + j) % 3 == 0, r"67% zeros and 100% .*do not fill blocks: prune with pattern=\(4, 2\)"),
        (lambda i, j: i < 4, None),
        (lambda i, j: i < 0, None),
    ],
)
def test_little_to_skip_is_said(kept, message):
    i, j = torch.meshgrid(torch.arange(8), torch.arange(6), indexing="ij")
    weight = kept(i, j).float()
    density = BlockMatrix.from_dense(weight, (4, 2)).density
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_dense("weight_x", weight, (4, 2), density)
    assert len(caught) == (message is not None)
    if message:
        with pytest.warns(UserWarning, match=message):
            warn_if_dense("weight_x", weight, (4, 2), density)
        with pytest.warns(UserWarning, match="it stays dense and runs as a dense matrix product; "):
            warn_if_dense("weight_x", weight, (4, 2), density, kept_dense=True)


def test_break_even_is_said_per_engine_and_size(monkeypatch):
    monkeypatch.setattr(weight_storage, "BREAK_EVEN_MACHINE", "a machine")
    monkeypatch.setattr(weight_storage, "BREAK_EVEN_ZEROS", {"nn.GRU": {8: 0, 16: 0.125}, "y": {8: 0.5}})
    assert break_even_text() == (
        "A GRU layer on the CPU breaks even with nn.GRU at 0% zeros for H 8, 12% zeros for H 16; "
        "with y at 50% zeros for H 8: a machine."
    )


def make_layer(stored: int, dtype=torch.float32, cell: Any = nn.LSTM) -> Any:
    """A layer of which `stored` of 10 columns of weight_ih, and a column of each other matrix, are not zero."""
    torch.manual_seed(0)
    layer = cell(10, 20, **({"proj_size": 3} if cell is nn.LSTM else {}), dtype=dtype).requires_grad_(False)
    for name, weight in layer.named_parameters():
        if name.startswith("weight"):
            weight[:, stored if "ih" in name else 1 :] = 0
    return layer


@pytest.mark.filterwarnings("ignore:.*little to skip")
@pytest.mark.parametrize("block_size", [None, (16, 1), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_input_weight_that_was_not_pruned_stays_dense(block_size, dtype):
    """Unless blocks that the kernels run at full speed are asked for."""
    for stored in (0, 5, 8, 9, 10):
        layer = make_layer(stored, dtype)
        weights = store_weights(layer, dtype, block_size)
        kept = isinstance(weights["weight_ih_l0"], Tensor)
        assert kept == (stored == 10 and block_size != (16, 1))
        if kept:
            assert torch.equal(weights["weight_ih_l0"], layer.weight_ih_l0)  # type: ignore[arg-type]
            assert weights["weight_ih_l0"].data_ptr() != layer.weight_ih_l0.data_ptr()  # type: ignore[union-attr]
        assert isinstance(weights["weight_hh_l0"], BlockMatrix)
        assert isinstance(store_weights(layer, torch.int8, block_size)["weight_ih_l0"], BlockMatrix)


@pytest.mark.filterwarnings("ignore:.*little to skip")
def test_a_recurrent_weight_goes_to_blocks_however_dense():
    layer = make_layer(0)
    nn.init.ones_(layer.weight_hh_l0)
    nn.init.ones_(layer.weight_hr_l0)
    weights = store_weights(layer, torch.float32, None)
    for name in ("weight_hh_l0", "weight_hr_l0"):
        matrix = weights[name]
        assert isinstance(matrix, BlockMatrix)
        assert matrix.density == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_the_projection_is_stored_like_the_other_matrices(dtype):
    """Without a warning, however dense it is: a Pruner leaves it alone."""
    layer = make_layer(3)
    nn.init.ones_(layer.weight_hr_l0)
    matrix = store_weights(layer, dtype, None)["weight_hr_l0"]
    assert isinstance(matrix, BlockMatrix)
    assert (matrix.shape, matrix.gates, matrix.values.dtype) == ((3, 20), 1, dtype)
    torch.testing.assert_close(matrix.to_dense().float(), layer.weight_hr_l0, rtol=0.01, atol=0)


@pytest.mark.filterwarnings("ignore:.*little to skip")
@pytest.mark.parametrize("cell", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("stored", [3, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_to_buffers_and_back(cell, stored, dtype):
    layer = make_layer(stored, cell=cell)
    for name, weight in store_weights(layer, dtype, None).items():
        buffers = to_buffers(name, weight)
        assert weight_shape(layer, name) == getattr(layer, name).shape
        again = from_buffers(layer, name, {"another": None, **buffers})
        if isinstance(weight, Tensor):
            assert buffers == {name: weight}
            assert again is weight
        else:
            assert isinstance(again, BlockMatrix)
            assert vars(again) == vars(weight)  # the same tensors
    with pytest.raises(KeyError):
        from_buffers(layer, "weight_hh_l0", {})


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("proj_size", [0, 2])
def test_shapes_are_those_of_torch_nn(num_layers, bidirectional, proj_size):
    layer = nn.LSTM(3, 4, num_layers, bidirectional=bidirectional, proj_size=proj_size)
    assert all(weight_shape(layer, name) == weight.shape for name, weight in layer.named_parameters())


def test_a_layer_without_a_kernel_is_named_with_the_reason():
    with pytest.warns(
        UserWarning,
        match=r"backend 'reference', .* 'triton' cannot run it because of x\. backend='reference' asks for this",
    ):
        warn_if_slow("triton", "of x")


@pytest.mark.parametrize(
    ("cell", "options", "reason"),
    [
        (nn.LSTM, {"weight_dtype": torch.float64}, "weight_ih is stored as torch.float64"),
        (nn.GRU, {"weight_dtype": torch.float64}, "weight_ih is stored as torch.float64"),
        (nn.GRU, {}, None),
        (nn.LSTM, {"storage": (3, 1)}, None),
        (nn.LSTM, {"weight_dtype": torch.float64, "backend": "reference"}, None),
        (nn.GRU, {"backend": "cpu"}, None),
    ],
)
def test_a_fall_back_to_the_reference_is_said_unless_asked_for(cell, options, reason):
    layer = cell(4, 12).requires_grad_(False)
    for weight in (layer.weight_ih_l0, layer.weight_hh_l0):
        weight[:, 1:] = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        to_sparse(layer, **{"storage": (4, 1), **options})
    said = [str(warning.message) for warning in caught]
    assert len(said) == (reason is not None), said
    if reason:
        assert said[0].startswith("the layer will run on backend 'reference', plain torch")
        assert reason in said[0]


@pytest.mark.parametrize(("input_size", "warns"), [(2, False), (3, True)])
def test_of_a_dense_input_weight_of_few_columns_nothing_is_said(input_size, warns):
    layer = nn.GRU(input_size, 32)
    with torch.no_grad():
        layer.get_parameter("weight_hh_l0")[:, 3:] = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        store_weights(layer, torch.float32, None)
    assert [str(warning.message)[:12] for warning in caught] == ["weight_ih_l0"] * warns
