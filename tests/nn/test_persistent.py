"""The persistent modules as modules: made, shown, moved, copied, saved."""

import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from persistent_cases import (
    BLOCK_SIZE,
    CELLS,
    assert_same_bits,
    convert,
    each_backend,
    every_cell_and_backend,
    make_pruned,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

from triton_sparse_rnn import BackendUnavailableError, BlockMatrix, PersistentGRU, PersistentLSTM, PersistentRNN
from triton_sparse_rnn.nn.persistent_module import PERSISTENT_CLASSES
from triton_sparse_rnn.nn.persistent_tools import PersistentTools
from triton_sparse_rnn.sparse.patterns import Blocks
from triton_sparse_rnn.sparse.picks import Picks

SIZES = ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size"]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_dense_and_back_bit_for_bit(cell, bias, bidirectional):
    options: dict[str, Any] = {"proj_size": 3} if cell is nn.LSTM else {}
    options |= {"nonlinearity": "relu"} if cell is nn.RNN else {}
    layer = make_pruned(
        cell, num_layers=2, bias=bias, bidirectional=bidirectional, batch_first=True, dropout=0.25, **options
    )
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    ours = convert(layer)
    dense: Any = ours.to_dense()
    for module in (ours, dense):
        assert {name: getattr(module, name) for name in SIZES} == {name: getattr(layer, name) for name in SIZES}
        assert module.mode == layer.mode
        assert not module.training
    assert type(dense) is cell
    assert list(dense.state_dict()) == list(before)
    assert all(parameter.requires_grad for parameter in dense.parameters())
    assert_same_bits(list(dense.state_dict().values()), list(before.values()))
    assert_same_bits(list(layer.state_dict().values()), list(before.values()))
    assert list(ours.named_parameters()) == []
    with torch.no_grad():
        for parameter in (*layer.parameters(), *dense.parameters()):
            parameter.fill_(9)
    assert_same_bits(list(ours.to_dense().state_dict().values()), list(before.values()))


@pytest.mark.parametrize("cell", CELLS)
def test_stored_weights_are_the_buffers(cell):
    layer = make_pruned(cell, num_layers=2, bidirectional=True)
    ours = convert(layer)
    weights = ours.stored_weights()
    assert list(weights) == list(layer.state_dict())
    buffers = {id(buffer) for buffer in ours.buffers()}
    for name, weight in weights.items():
        parts = [weight.values, weight.columns, weight.starts] if isinstance(weight, BlockMatrix) else [weight]
        assert all(id(part) in buffers for part in parts)
        dense = weight.to_dense() if isinstance(weight, BlockMatrix) else weight
        assert torch.equal(dense, getattr(layer, name))
    assert list(ours.stored_weights(1)) == [name for name in weights if "_l1" in name]
    assert ours.nbytes == sum(weight.nbytes for weight in weights.values())
    dense_bytes = sum(parameter.nbytes for parameter in layer.parameters())
    assert ours.nbytes < dense_bytes
    assert 0.2 < ours.density < 0.45


def test_each_weight_has_the_fastest_of_the_listed_patterns():
    layer: Any = nn.GRU(64, 64, num_layers=2).requires_grad_(False)
    keep = (torch.arange(12 * 4) % 8 == 0).view(12, 4).repeat_interleave(16, 0).repeat_interleave(16, 1)
    layer.weight_ih_l0.mul_(keep)
    keep = (torch.arange(12 * 64) % 8 == 0).view(12, 64).repeat_interleave(16, 0)
    for weight in (layer.weight_hh_l0, layer.weight_ih_l1):
        weight.mul_(keep)
    layer.weight_hh_l1.mul_(torch.arange(64) == torch.arange(192)[:, None] % 64)  # a bank of 32 holds all 16 rows
    ours = PersistentGRU.from_dense(layer)
    weights: Any = ours.stored_weights()
    assert weights["weight_ih_l0"].pattern == Blocks(16, 16)
    assert weights["weight_hh_l0"].pattern == weights["weight_ih_l1"].pattern == Blocks(16, 1)
    assert isinstance(weights["weight_hh_l1"].pattern, Picks)
    assert "storage=[Blocks(rows=16, columns=16), Blocks(rows=16, columns=1), Picks(rows=16, bank=" in repr(ours)


def test_repr():
    layer = make_pruned(nn.GRU, 5, 7, num_layers=2, bidirectional=True)
    text = repr(convert(layer, "reference"))
    assert text.startswith("PersistentGRU(5, 7, num_layers=2, bidirectional=True, density=0.3")
    assert text.endswith(
        f"storage={Blocks(*BLOCK_SIZE)}, weight_dtype=torch.float32, nbytes=3536, backend='reference')"
    )
    assert "proj_size=3" in repr(convert(make_pruned(nn.LSTM, proj_size=3)))


@pytest.mark.parametrize("cell", CELLS)
def test_repr_shows_the_backend_that_runs(cell):
    ours = convert(make_pruned(cell, num_layers=2), None)
    assert repr(ours).endswith("backend='cpu')")
    assert repr(ours.double()).endswith("backend='reference')")
    mixed = convert(make_pruned(cell, num_layers=2), None)
    mixed.weight_hh_l1_values = mixed.weight_hh_l1_values.double()
    assert repr(mixed).endswith("backend='cpu/reference')")


def test_train_changes_nothing_and_says_so_once(monkeypatch):
    monkeypatch.setattr(PersistentTools, "_said_train_changes_nothing", False)
    ours = convert(make_pruned(nn.GRU, num_layers=2, dropout=0.5))
    x = torch.randn(5, 2, 5)
    expected = ours(x)
    with pytest.warns(UserWarning, match=r"PersistentGRU is for inference: train\(\) changes nothing"):
        assert ours.train() is ours
    assert ours.training
    assert_same_bits(ours(x), expected)
    assert not ours.eval().training  # and says nothing
    assert ours.train().training
    assert convert(make_pruned(nn.LSTM)).train().training
    assert ours.flatten_parameters() is None


def test_a_layer_in_training_mode_is_converted_silently():
    assert convert(make_pruned(nn.GRU).train()).training


@pytest.mark.parametrize("cell", CELLS)
def test_state_dict_into_a_module_of_the_same_structure(cell):
    layer = make_pruned(cell)
    ours = convert(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2)
    other = convert(layer)
    assert list(ours.state_dict())[:3] == ["weight_ih_l0_values", "weight_ih_l0_columns", "weight_ih_l0_starts"]
    ours.load_state_dict(other.state_dict())
    assert_same_bits(list(ours.to_dense().state_dict().values()), list(layer.state_dict().values()))


@every_cell_and_backend
def test_copies(cell, backend):
    ours = convert(make_pruned(cell), backend, weight_dtype=torch.float32)
    x = torch.randn(4, 2, 5)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for copied in (torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(ours))):
        assert_same_bits(copied(x), ours(x))
        assert repr(copied) == repr(ours)
    ours.share_memory()
    assert ours(x)[0].shape == (4, 2, 7)


def test_meta_and_back():
    ours = convert(make_pruned(nn.GRU))
    meta = convert(make_pruned(nn.GRU)).to("meta")
    assert meta(torch.empty(3, 2, 5, device="meta"))[0].shape == (3, 2, 7)
    with pytest.raises(ValueError, match="RNN input dtype"):
        meta(torch.empty(3, 2, 5, device="meta", dtype=torch.float64))
    empty = meta.to_empty(device="cpu")
    empty.load_state_dict(ours.state_dict())
    x = torch.randn(3, 2, 5)
    assert_same_bits(empty(x), ours(x))


@every_cell_and_backend
def test_calls_follow_what_is_changed_after_the_first(cell, backend):
    layer = make_pruned(cell, num_layers=2)
    ours, x = convert(layer, backend), torch.randn(4, 2, 5)

    def assert_follows():
        assert_same_bits(ours(x), convert(layer, ours.backend)(x))

    assert_follows()
    for changed in (layer, ours):
        changed.bias_ih_l1.mul_(2)
    assert_follows()
    layer.bias_hh_l0.add_(1)
    ours.bias_hh_l0 = ours.bias_hh_l0 + 1
    assert_follows()
    layer.weight_hh_l0.mul_(2)
    ours.load_state_dict(convert(layer).state_dict(), assign=True)
    assert_follows()
    ours.backend = "reference"
    assert_follows()
    layer, ours, x = layer.double(), ours.double(), x.double()
    assert_follows()
    layer, ours, x = layer.float(), ours.float(), x.float()
    ours.backend = None
    assert_follows()
    ours.backend = "gpu"
    with pytest.raises(ValueError, match="backend must be None or one of"):
        ours(x)


def test_a_named_backend_refuses_what_the_module_becomes():
    ours = convert(make_pruned(nn.GRU), "cpu").double()
    with pytest.raises(BackendUnavailableError, match="it computes in float32"):
        ours(torch.zeros(3, 2, 5, dtype=torch.float64))


@pytest.mark.parametrize("cls", [PersistentRNN, PersistentGRU, PersistentLSTM])
def test_wrong_layers(cls):
    others = [dense() if dense is nn.Module else dense(2, 3) for dense in (nn.RNN, nn.GRU, nn.LSTM, nn.GRUCell)]
    for layer in others:
        if PERSISTENT_CLASSES.get(type(layer)) is not cls:  # type: ignore[arg-type]
            with pytest.raises(
                TypeError, match=f"{cls.__name__}.from_dense takes a layer of class nn.*, got {type(layer).__name__}"
            ):
                cls.from_dense(layer)
    with pytest.raises(ValueError, match="weight_ih_l0 is on the meta device"):
        cls.from_dense(cls.dense_class(2, 3, device="meta"))


def replace_data(module: nn.Module, dtype: torch.dtype) -> None:
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)


@pytest.mark.parametrize("cell", CELLS)
def test_data_of_buffers_in_another_dtype(cell):
    """As torch.nn.Module.half() once did, and some tools do: the buffers stay the same objects."""
    ours, other = (convert(make_pruned(cell, num_layers=2)) for _ in range(2))
    x = torch.randn(4, 2, 5)
    before = ours(x)
    replace_data(ours, torch.float16)
    result = ours(x.half())
    assert_same_bits(result, other.half()(x.half()))
    assert result[0].dtype == torch.float16
    replace_data(ours, torch.float64)
    torch.testing.assert_close(ours(x.double())[0].float(), before[0], rtol=0, atol=0.01)


def test_data_of_buffers_in_a_dtype_that_the_backend_does_not_run():
    named, free = (convert(make_pruned(nn.GRU), backend) for backend in ("cpu", None))
    x = torch.randn(4, 2, 5)
    for ours in (named, free):
        ours(x)
        replace_data(ours, torch.float64)
    with pytest.raises(BackendUnavailableError, match="it computes in float32"):
        named(x.double())
    assert_same_bits(free(x.double()), convert(make_pruned(nn.GRU)).double()(x.double()))


@each_backend
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weight_hh_l0_values", lambda t: torch.stack([t, t], -1)[..., 0], "must be contiguous"),
        ("weight_ih_l0_columns", lambda t: torch.stack([t, t], -1)[..., 0], "must be contiguous"),
        ("weight_hh_l0_columns", lambda t: t.long(), "columns must be torch.int32"),
        ("weight_hh_l0_columns", lambda t: t + 7, r"columns must lie in 0..6"),
        ("weight_hh_l0_starts", lambda t: t + 1, "starts must rise from 0"),
        ("bias_ih_l0", lambda t: t.double(), "bias_ih must be torch.float32 of shape .* got torch.float64"),
        ("bias_hh_l0", lambda t: t.repeat_interleave(2)[::2], "bias_hh must be contiguous"),
    ],
)
@pytest.mark.parametrize("called_before", [True, False])
def test_assigned_tensors_are_checked(cell, backend, name, change, message, called_before):
    ours = convert(make_pruned(cell), backend)
    x = torch.randn(4, 2, 5)
    if called_before:
        ours(x)
    state = ours.state_dict()
    ours.load_state_dict(state | {name: change(state[name])}, assign=True)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            ours(x)
    ours.load_state_dict(state, assign=True)
    assert_same_bits(ours(x), convert(make_pruned(cell), backend)(x))


@pytest.mark.parametrize("cell", CELLS)
def test_weights_that_hooks_compute_are_refused(cell):
    pruned, normed = make_pruned(cell), make_pruned(cell)
    prune.l1_unstructured(pruned, "weight_hh_l0", 0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old one is what is tested
        weight_norm(normed, "weight_hh_l0")
    for layer in (pruned, normed):
        with pytest.raises(ValueError, match=r"weight_hh_l0 is computed by a hook .*remove.*\(layer, 'weight_hh_l0'\)"):
            convert(layer)
    prune.remove(pruned, "weight_hh_l0")
    assert torch.equal(convert(pruned, storage=(1, 1)).to_dense().weight_hh_l0, pruned.weight_hh_l0)


@pytest.mark.filterwarnings("ignore:weight_hh_l0 is")  # dense
@pytest.mark.parametrize("cell", CELLS)
def test_parametrized_weights_are_converted(cell):
    layer: Any = make_pruned(cell)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    with torch.no_grad():
        layer.parametrizations.weight_hh_l0.original0.mul_(2)
    assert parametrize.is_parametrized(layer, "weight_hh_l0")
    dense = convert(layer).to_dense()
    assert torch.equal(dense.weight_hh_l0, layer.weight_hh_l0)
    assert not torch.equal(dense.weight_hh_l0, make_pruned(cell).weight_hh_l0)


@pytest.mark.parametrize("cast", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.int8])
def test_casts_leave_weights_in_a_dtype_of_their_own(weight_dtype, cast):
    ours = convert(make_pruned(nn.GRU), weight_dtype=weight_dtype)
    before = {name: tensor.clone() for name, tensor in ours.named_buffers() if name.startswith("weight")}
    assert ours.to(cast) is ours
    after = dict(ours.named_buffers())
    assert_same_bits([after[name] for name in before], list(before.values()))
    assert ours.bias_ih_l0.dtype == ours.dtype == cast
    assert ours(torch.zeros(2, 3, 5, dtype=cast))[0].dtype == cast


def test_methods_that_cast_and_move():
    ours = convert(make_pruned(nn.GRU), weight_dtype=torch.bfloat16)
    for cast in (ours.float, ours.half, ours.double):
        cast()
        assert ours.weight_hh_l0_values.dtype == torch.bfloat16
    meta = ours.to("meta", torch.float32)
    assert {buffer.device.type for buffer in meta.buffers()} == {"meta"}
    assert meta.weight_hh_l0_values.dtype == torch.bfloat16
    follows = convert(make_pruned(nn.GRU)).double()
    assert follows.weight_hh_l0_values.dtype == torch.float64


def test_a_step_says_that_hooks_do_not_run():
    ours: Any = convert(make_pruned(nn.GRU))
    x = torch.randn(2, 5)
    expected = ours.step(x)[0]
    handle = ours.register_forward_pre_hook(lambda module, given: (2 * given[0], *given[1:]))
    with pytest.warns(UserWarning, match=r"step\(\) of this PersistentGRU does not run its forward hooks"):
        assert torch.equal(ours.step(x)[0], expected)
    handle.remove()
    assert torch.equal(ours.step(x)[0], expected)
