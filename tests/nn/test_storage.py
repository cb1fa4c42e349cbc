from typing import Any

import pytest
import torch
from torch import Tensor, nn

from triton_sparse_rnn.nn.storage import (
    buffer_names,
    from_buffers,
    layer_weights,
    store_weights,
    to_buffers,
)
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.layer_config import LayerConfig
from triton_sparse_rnn.sparse.patterns import Blocks


def make_layer(stored: int, dtype=torch.float32, cell: Any = nn.LSTM) -> Any:
    """A layer of which `stored` of 10 columns of weight_ih, and a column of each other matrix, are not zero."""
    torch.manual_seed(0)
    layer = cell(10, 20, **({"proj_size": 3} if cell is nn.LSTM else {}), dtype=dtype).requires_grad_(False)
    for name, weight in layer.named_parameters():
        if name.startswith("weight"):
            weight[:, stored if "ih" in name else 1 :] = 0
    return layer


@pytest.mark.filterwarnings("ignore:.*little to skip")
@pytest.mark.parametrize(("pattern", "dense_from"), [(None, 8), (Blocks(5, 1), 10), (Blocks(16, 1), 11)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_input_weight_of_which_little_was_pruned_stays_dense(pattern, dense_from, dtype):
    """Where that is faster, and unless blocks that the kernels run at full speed are asked for."""
    for stored in (0, 5, 8, 9, 10):
        layer = make_layer(stored, dtype)
        weights = store_weights(layer, dtype, pattern)
        kept = isinstance(weights["weight_ih_l0"], Tensor)
        assert kept == (stored >= dense_from)
        if kept:
            assert torch.equal(weights["weight_ih_l0"], layer.weight_ih_l0)  # type: ignore[arg-type]
            assert weights["weight_ih_l0"].data_ptr() != layer.weight_ih_l0.data_ptr()  # type: ignore[union-attr]
        assert isinstance(weights["weight_hh_l0"], BlockMatrix)
        assert isinstance(store_weights(layer, torch.int8, pattern)["weight_ih_l0"], BlockMatrix)


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
    config = LayerConfig.of(layer)
    for name, weight in store_weights(layer, dtype, None).items():
        buffers = to_buffers(name, weight)
        assert buffers.keys() <= buffer_names(config)
        again = from_buffers(config, name, {"another": None, **buffers})
        if isinstance(weight, Tensor):
            assert buffers == {name: weight}
            assert again is weight
        else:
            assert isinstance(again, BlockMatrix)
            assert vars(again) == vars(weight)  # the same tensors
    with pytest.raises(KeyError):
        from_buffers(config, "weight_hh_l0", {})


def test_weights_of_a_layer_by_direction():
    layer: Any = nn.LSTM(3, 4, 2, proj_size=2, bias=False, bidirectional=True).requires_grad_(False)
    for weight in layer.parameters():
        weight[:, 1:] = 0
    stored = store_weights(layer, torch.float32, None)
    buffers: dict[str, Tensor | None] = {}
    for name, weight in stored.items():
        buffers |= to_buffers(name, weight)
    forward, reverse = layer_weights(LayerConfig.of(layer), buffers, 1)
    assert (forward.bias_ih, forward.bias_hh, reverse.bias_ih) == (None, None, None)
    for direction, end in ((forward, ""), (reverse, "_reverse")):
        for kind in ("weight_ih", "weight_hh", "weight_hr"):
            assert vars(getattr(direction, kind)) == vars(stored[f"{kind}_l1{end}"])
