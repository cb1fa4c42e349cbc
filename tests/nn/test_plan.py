"""Eager calls are prepared once, and anew when something changes that they rest on."""

import copy
import pickle
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from persistent_cases import (
    CELLS,
    assert_same_bits,
    convert,
    each_backend,
    every_cell_and_backend,
    every_cell_on_the_cpu,
    make_pruned,
    make_states,
    tensors_of,
)
from rounding import assert_same_sums, terms_of
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from triton_sparse_rnn.nn.persistent import PersistentLayer
from triton_sparse_rnn.ops.dispatch import BACKENDS


@pytest.fixture
def prepared(monkeypatch) -> list[dict[str, Any]]:
    """The options with which layers are prepared from now on."""
    seen: list[dict[str, Any]] = []

    def spy(prepare_layer):
        def prepare(layer, num_threads):
            seen.append({"dtype": layer.dtype, "activation_dtype": layer.activation_dtype, "num_threads": num_threads})
            return prepare_layer(layer, num_threads)

        return prepare

    for backend in BACKENDS.values():
        monkeypatch.setattr(backend, "prepare_layer", spy(backend.prepare_layer))
    return seen


def call_in_every_form(ours: PersistentLayer) -> None:
    x = torch.randn(4, 2, 5)
    for form in (x, x[:, 0], x.transpose(0, 1), pack_sequence([x[:, 0], x[:2, 1]]), x[:, :0]):
        ours(form)
    ours.step(x[0])
    ours.step(x[0, 0])
    ours(x, make_states(ours, 2))


@every_cell_and_backend
def test_layers_are_prepared_once(prepared, cell, backend):
    ours = convert(make_pruned(cell, num_layers=2), backend)
    assert prepared == []
    call_in_every_form(ours)
    assert prepared == [{"dtype": torch.float32, "activation_dtype": None, "num_threads": 1}] * 2


@every_cell_and_backend
def test_warm_up_leaves_nothing_for_the_first_call(prepared, cell, backend):
    ours = convert(make_pruned(cell, num_layers=2, bidirectional=True, batch_first=True), backend)
    with torch.enable_grad():
        assert ours.warm_up() is None
    assert len(prepared) == 2
    plan = ours._plan
    x = torch.randn(4, 3, 5)
    assert_same_bits(
        ours(x), convert(make_pruned(cell, num_layers=2, bidirectional=True, batch_first=True), backend)(x)
    )
    assert ours._plan is plan
    assert plan is not None
    assert not any(tensor.is_inference() for tensor in tensors_of(ours(x)))


def test_warm_up_calls_no_hooks_and_reports_what_a_call_would():
    ours, called = convert(make_pruned(nn.GRU)), []
    ours.register_forward_hook(lambda *arguments: called.append(1))
    ours.warm_up()
    assert called == []
    ours.bias_ih_l0 = ours.bias_ih_l0.double()
    with pytest.raises(ValueError, match=r"bias_ih must be torch.float32"):
        ours.warm_up()


def test_warm_up_of_a_model():
    model = nn.Sequential(convert(make_pruned(nn.GRU)), nn.Linear(2, 2))
    for module in model.modules():
        if hasattr(module, "warm_up"):
            module.warm_up()  # type: ignore[operator]
    assert model[0]._plan is not None


@pytest.mark.parametrize(
    ("name", "value"), [("backend", None), ("num_threads", 2), ("activation_dtype", torch.int8), ("backend", "cpu")]
)
def test_settings_are_followed(prepared, name, value):
    ours = convert(make_pruned(nn.GRU), weight_dtype=torch.int8 if name == "activation_dtype" else None)
    ours(torch.zeros(2, 1, 5))
    setattr(ours, name, value)
    for call in (ours, ours.forward, lambda x: ours.step(x[0])):
        call(torch.zeros(2, 1, 5))
    assert len(prepared) == 2
    assert name == "backend" or prepared[1][name] == value


def test_wrong_settings_are_refused():
    ours = convert(make_pruned(nn.GRU))
    ours.warm_up()
    ours.num_threads = 0
    with pytest.raises(ValueError, match="num_threads must be at least 1"):
        ours(torch.zeros(2, 1, 5))
    ours.num_threads, ours.activation_dtype = 1, torch.int8
    with pytest.raises(ValueError, match=r"activation_dtype=torch.int8 needs weights in torch.int8"):
        ours.step(torch.zeros(1, 5))


def move_storage(ours: PersistentLayer) -> None:
    for buffer in ours.buffers():
        buffer.share_memory_()


def replace_data(ours: PersistentLayer) -> None:
    for buffer in ours.buffers():
        buffer.data = buffer.data.clone()


def replace_buffers(ours: PersistentLayer) -> None:
    for name, buffer in ours._buffers.items():
        ours._buffers[name] = None if buffer is None else buffer.clone()


def send_state(ours: PersistentLayer) -> None:
    """As a queue of torch.multiprocessing does: the tensors are moved to shared memory while they are pickled."""
    ForkingPickler.dumps(ours.state_dict())


CHANGES: dict[str, Any] = {
    "share_memory": lambda ours: ours.share_memory(),
    "share_memory_ of each": move_storage,
    "data": replace_data,
    "buffers": replace_buffers,
    "state sent": send_state,
    "module sent": ForkingPickler.dumps,
    "load_state_dict": lambda ours: ours.load_state_dict(
        {k: v.clone() for k, v in ours.state_dict().items()}, assign=True
    ),
    "to and back": lambda ours: ours.double().float(),
}


@each_backend
@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_move_are_prepared_anew(prepared, cell, backend, change):
    """Prepared layers keep addresses, and what was there is freed."""
    ours = convert(make_pruned(cell), backend)
    x, hx = torch.randn(4, 2, 5), make_states(ours, 2)
    expected = [ours(x), ours.step(x[0], hx)]
    CHANGES[change](ours)
    assert_same_bits([ours.step(x[0], hx), ours(x)], expected[::-1])
    assert len(prepared) == 2


def test_what_makes_no_difference_prepares_nothing(prepared):
    ours = convert(make_pruned(nn.GRU))
    x = torch.randn(4, 2, 5)
    ours(x)
    ours.eval()
    ours.name = "encoder"
    ours.bias_ih_l0.mul_(2)
    assert_same_bits(ours(x), convert(ours.to_dense())(x))
    assert len(prepared) == 2  # the one just made too


CALLS: dict[str, Any] = {
    "call": lambda ours, x: ours(x),
    "step": lambda ours, x: ours.step(x[0]),
    "packed": lambda ours, x: ours(pack_sequence([x[:, 0]])),
    "operator": lambda ours, x: ours(x.clone().requires_grad_()),
}


def converted_in_inference_mode(layer: nn.RNNBase, backend: str) -> PersistentLayer:
    with torch.inference_mode():
        return convert(layer, backend)


@every_cell_on_the_cpu
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("make", [convert, converted_in_inference_mode])
def test_indices_that_are_written_to_are_looked_at_again(cell, backend, call, make):
    """Kernels read as far as they say."""
    x = torch.randn(4, 2, 5)
    for part, wrong in (("columns", 10**8), ("starts", 10**6)):
        ours = make(make_pruned(cell), backend)
        with torch.inference_mode():
            CALLS[call](ours, x.clone())
            ours.get_buffer(f"weight_hh_l0_{part}").fill_(wrong)
        with pytest.raises(ValueError, match=rf"{part} must (lie in|rise from) 0"):
            CALLS[call](ours, x)


@pytest.mark.parametrize("make", [convert, converted_in_inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_weights_that_are_written_to_count(make, dtype, backend):
    ours = make(make_pruned(nn.GRU).to(dtype), backend)
    x = torch.randn(4, 2, 5).to(dtype)
    with torch.inference_mode():
        ours(x)
        for name, buffer in ours.named_buffers():
            if name.endswith("values") or name.startswith("bias"):
                buffer.mul_(2)
    assert_same_bits(ours(x), convert(ours.to_dense(), backend)(x))


@each_backend
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("left_bytes", [0, 4])
def test_buffers_that_were_freed(cell, backend, call, left_bytes):
    x = torch.randn(4, 2, 5)
    freed = ["weight_hh_l0_values", "weight_ih_l0_columns", "weight_hh_l0_starts", "bias_hh_l0"]
    for name in freed if backend != "triton" else freed[:1]:
        ours = convert(make_pruned(cell), backend)
        CALLS[call](ours, x)
        ours.get_buffer(name).untyped_storage().resize_(left_bytes)
        with pytest.raises(RuntimeError, match=f"{name.replace('_l0', '')} has no memory for its numbers"):
            CALLS[call](ours, x)


@each_backend
@pytest.mark.parametrize("left_bytes", [0, 4])
def test_inputs_and_states_that_were_freed(cell, backend, left_bytes):
    ours = convert(make_pruned(cell), backend)
    ours(torch.randn(4, 2, 5))
    for call in (
        lambda x, hx: ours(x[1:], hx),
        lambda x, hx: ours.step(x[0], hx),
        lambda x, hx: ours(x[:, 0], tuple(h[:, 0] for h in hx) if isinstance(hx, tuple) else hx[:, 0]),
        lambda x, hx: ours(pack_sequence([x[:, 0], x[:, 1]]), hx),
        lambda x, hx: ours(x.clone().requires_grad_(), hx),
    ):
        hx = make_states(ours, 2)
        (hx[-1] if isinstance(hx, tuple) else hx).untyped_storage().resize_(left_bytes)
        with pytest.raises(RuntimeError, match=r"hx has no memory|out of bounds for storage"):
            call(torch.randn(4, 2, 5), hx)
    for strided in (torch.randn(4, 2, 5), torch.randn(9, 2, 5)[5:], torch.randn(4, 2, 10)[..., ::2]):
        step = strided[0]
        strided.untyped_storage().resize_(left_bytes)
        for call in (lambda: ours(strided), lambda: ours.step(step), lambda: ours(strided, make_states(ours, 2))):  # noqa: B023
            with pytest.raises(RuntimeError, match="input has no memory"):
                call()


def test_copies_do_not_share_a_plan():
    ours = convert(make_pruned(nn.GRU))
    ours.warm_up()
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert copied._plan is None


@pytest.mark.parametrize("cell", CELLS)
def test_plain_calls_take_the_short_way(monkeypatch, cell):
    layer = make_pruned(cell, num_layers=2)
    ours = convert(layer)
    batch_first = convert(make_pruned(cell, num_layers=2, batch_first=True))
    x = torch.randn(4, 2, 5)
    hx = make_states(ours, 2)
    y = ours(x, hx)
    batch_first.warm_up()
    monkeypatch.setattr("triton_sparse_rnn.nn.persistent.read_call", None)
    monkeypatch.setattr("triton_sparse_rnn.nn.persistent.read_step", None)
    assert_same_bits(ours(x, hx), y)
    strided = torch.stack([x, x], -1)[..., 0]
    assert_same_bits(ours(strided, hx), y)
    assert_same_bits(ours(x), ours(x, tuple(map(torch.zeros_like, hx)) if cell is nn.LSTM else torch.zeros_like(hx)))
    first = batch_first(x.transpose(0, 1), hx)
    assert_same_bits((first[0].transpose(0, 1), first[1]), y)
    assert first[0].stride() == y[0].transpose(0, 1).stride()
    assert_same_sums([ours.step(x[0], hx)[0]], [y[0][0]], terms_of(layer))
    ours.step(x[0])


def test_what_was_added_to_a_layer_is_not_looked_at(prepared):
    layer: Any = make_pruned(nn.GRU)
    layer.register_buffer("calls", torch.tensor(0))
    ours: Any = convert(layer, "cpu")
    ours.register_buffer("last", None)

    def count(module, args, result):
        module.calls = module.calls + 1
        module.last = result[0]

    ours.register_forward_hook(count)
    x = torch.randn(4, 2, 5)
    first = ours(x)[0]
    assert torch.equal(ours(x)[0], first)
    assert (ours.calls.item(), len(prepared)) == (2, 1)
    del ours._buffers["bias_hh_l0"]
    with pytest.raises(KeyError):
        ours(x)
