"""Idioms of code written for nn.GRU, and states that are assigned to a module without data."""

import copy
import io
from typing import Any

import pytest
import torch
from persistent_cases import CELLS, assert_same_bits, convert, make_pruned, make_states, tensors_of
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

OPTIONS: dict[Any, dict[str, Any]] = {nn.RNN: {}, nn.GRU: {}, nn.LSTM: {"proj_size": 3}}
every_bias_and_cell = pytest.mark.parametrize(
    ("cell", "bias"), [(cell, bias) for cell in CELLS for bias in (True, False)]
)


class Encoder(nn.Module):
    """Makes its first state as a well-known tutorial does."""

    def __init__(self, rnn: Any):
        super().__init__()
        self.rnn = rnn

    def init_hidden(self, batch_size: int) -> Any:
        weight = next(self.rnn.parameters())
        size = self.rnn.num_layers * (2 if self.rnn.bidirectional else 1), batch_size, self.rnn.hidden_size
        zeros = weight.new_zeros(size), weight.data.new(*size).zero_()
        return zeros if self.rnn.mode == "LSTM" else zeros[0]

    def forward(self, x):
        return self.rnn(x, self.init_hidden(x.shape[1]))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_first_state_made_like_the_first_parameter(cell, dtype):
    model = Encoder(convert(make_pruned(cell, num_layers=2, bidirectional=True)).to(dtype))
    x = torch.randn(4, 3, 5, dtype=dtype)
    assert_same_bits(model(x), model.rnn(x))
    first = next(model.rnn.parameters())
    assert isinstance(first, nn.Parameter)
    assert (first.dtype, first.device, first.numel()) == (dtype, model.rnn.device, 0)
    assert next(model.to("meta").rnn.parameters()).is_meta


def test_the_empty_parameter_is_no_part_of_the_module():
    ours = convert(make_pruned(nn.GRU))
    model = nn.Sequential(ours, nn.Linear(7, 2))
    assert len(list(ours.parameters())) == 1
    assert sum(parameter.numel() for parameter in ours.parameters()) == 0
    assert len(list(model.parameters())) == 2
    assert list(ours.named_parameters()) == []
    ours.requires_grad_(True)  # does not make anything of it learn
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert not any(buffer.requires_grad for buffer in ours.buffers())
    ours.gain = nn.Parameter(torch.ones(2))
    assert [id(parameter) for parameter in ours.parameters()] == [id(ours.gain)]


@pytest.mark.parametrize(
    "name", ["weight_hh_l0", "weight_ih_l1_reverse", "weight_hr_l0", "_flat_weights", "all_weights"]
)
def test_weights_of_nn_say_where_they_are(name):
    ours = convert(make_pruned(nn.LSTM, num_layers=2, bidirectional=True, proj_size=3))
    with pytest.raises(AttributeError, match=f"has no {name}: .* stored_weights.*_l.*to_dense.* .dtype and .device"):
        getattr(ours, name)
    assert not hasattr(ours, name)
    assert getattr(ours, name, None) is None


def test_other_attributes_are_as_ever():
    ours = convert(make_pruned(nn.GRU))
    assert ours.bias_ih_l0 is ours.stored_weights()["bias_ih_l0"]
    for name in ("weight_hh", "weight_hh_l0_raw", "hidden"):
        with pytest.raises(AttributeError, match=f"'PersistentGRU' object has no attribute '{name}'"):
            getattr(ours, name)
    ours.weight_hh_l0 = "a user's own"
    assert ours.weight_hh_l0 == "a user's own"


@every_bias_and_cell
def test_a_state_assigned_to_a_module_on_the_meta_device(cell, bias):
    ours = convert(make_pruned(cell, num_layers=2, bias=bias, **OPTIONS[cell]), "cpu")
    x, hx = torch.randn(4, 3, 5), make_states(ours, 3)
    expected = ours(x, hx)
    state = ours.state_dict()
    skeleton = nn.Sequential(copy.deepcopy(ours).to("meta"))
    for empty in (skeleton, copy.deepcopy(skeleton)):
        assert empty(torch.empty(4, 3, 5, device="meta"))[0].is_meta
        empty.load_state_dict({f"0.{name}": tensor for name, tensor in state.items()}, assign=True)
        loaded: Any = empty[0]
        assert (loaded.device.type, loaded.dtype) == ("cpu", torch.float32)
        assert not any(buffer.is_meta for buffer in loaded.buffers())
        assert_same_bits(loaded(x, hx), expected)
        assert_same_bits(loaded(x), ours(x))
        assert_same_bits(copy.deepcopy(loaded).double().float()(x, hx), expected)
        assert loaded.warm_up() is None


@every_bias_and_cell
def test_a_state_of_another_dtype_is_assigned(cell, bias):
    ours = convert(make_pruned(cell, bias=bias, **OPTIONS[cell]))
    wide = copy.deepcopy(ours).double()
    ours(torch.randn(4, 3, 5))
    for layer in (ours, wide):
        layer.register_buffer("scale", torch.ones(2))  # in a dtype of its own
    ours.load_state_dict(wide.state_dict(), assign=True)
    assert ours.dtype == torch.float64
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    assert_same_bits(ours(x), wide(x))
    assert_same_bits(ours.float()(x.float()), wide.float()(x.float()))


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.int8])
def test_narrow_blocks_do_not_tell_the_dtype(weight_dtype):
    narrow = convert(make_pruned(nn.GRU), weight_dtype=weight_dtype)
    x = torch.randn(4, 3, 5)
    for ours in (copy.deepcopy(narrow).to("meta"), convert(make_pruned(nn.GRU)).to("meta")):
        if ours.state_dict().keys() == narrow.state_dict().keys():
            ours.load_state_dict(narrow.state_dict(), assign=True)
            assert ours.dtype == torch.float32
            assert_same_bits(ours(x), narrow(x))
    without_bias = convert(make_pruned(nn.GRU, bias=False), weight_dtype=weight_dtype)
    empty = copy.deepcopy(without_bias).to("meta")
    empty.load_state_dict(without_bias.state_dict(), assign=True)
    assert empty.dtype == torch.float32
    assert_same_bits(empty(x), without_bias(x))


def test_memory_without_content_is_filled_by_a_state():
    ours = convert(make_pruned(nn.GRU))
    x = torch.randn(4, 3, 5)
    expected = ours(x)
    empty = copy.deepcopy(ours).to("meta").to_empty(device="cpu")
    assert (empty.device.type, empty.dtype) == ("cpu", torch.float32)
    empty.load_state_dict(ours.state_dict())
    assert_same_bits(empty(x), expected)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        copy.deepcopy(ours).to("meta").to("cpu")


def test_a_saved_state_is_mapped_and_assigned():
    ours = convert(make_pruned(nn.LSTM, bidirectional=True))
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    empty = copy.deepcopy(ours).to("meta")
    empty.load_state_dict(torch.load(buffer, weights_only=True, map_location="cpu"), assign=True)
    x = torch.randn(4, 3, 5)
    assert_same_bits(empty(x), ours(x))


class Masking(nn.Module):
    """Calls what is no nn.LSTM with a mask of steps, as a module for reinforcement learning does."""

    def __init__(self, lstm: Any):
        super().__init__()
        self.lstm = lstm

    def forward(self, x: torch.Tensor, hx: Any, lengths: torch.Tensor) -> Any:
        if isinstance(self.lstm, nn.LSTM):
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            y, hx = self.lstm(packed, hx)
            return pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])[0], hx
        return self.lstm(x, hx, mask=torch.arange(x.shape[1]) < lengths[:, None])


def pack(lstm: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    mask = kwargs.pop("mask", None)
    if mask is None:
        return args, kwargs
    x, *rest = args
    return (pack_padded_sequence(x, mask.sum(1).cpu(), batch_first=True, enforce_sorted=False), *rest), kwargs


def pad(lstm: Any, args: Any, result: Any) -> Any:
    y, hx = result
    return (pad_packed_sequence(y, batch_first=True)[0], hx) if isinstance(y, PackedSequence) else result


def test_two_hooks_take_a_mask():
    """The way that the documentation shows: a PersistentLSTM is no nn.LSTM, and takes a PackedSequence."""
    dense = Masking(make_pruned(nn.LSTM, batch_first=True))
    fast = Masking(convert(dense.lstm))
    arguments = torch.randn(3, 4, 5), make_states(fast.lstm, 3), torch.tensor([2, 4, 1])
    with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
        fast(*arguments)
    fast.lstm.register_forward_pre_hook(pack, with_kwargs=True)
    fast.lstm.register_forward_hook(pad)
    for ours, theirs in zip(tensors_of(fast(*arguments)), tensors_of(dense(*arguments)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    assert_same_bits(fast.lstm(arguments[0]), convert(dense.lstm)(arguments[0]))
