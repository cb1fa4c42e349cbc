from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from triton_sparse_rnn.ops.layer_weights import LayerWeights
from triton_sparse_rnn.ops.validation import (
    check_activation_dtype,
    check_batch_sizes,
    check_call,
    check_memory,
    check_num_threads,
    check_weights,
)
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.layer_config import GATES

B, I, H, P = 3, 4, 5, 2
CPU = torch.device("cpu")


def make_weights(mode="GRU", proj_size=0, dtype: torch.dtype | None = None, **changes: Any) -> LayerWeights:
    rows = GATES[mode] * H
    ih, hh = (
        BlockMatrix.from_dense(torch.eye(rows, columns), (2, 1), gates=GATES[mode], dtype=dtype)
        for columns in (I, proj_size or H)
    )
    weight_hr = BlockMatrix.from_dense(torch.ones(proj_size, H), (2, 1), dtype=dtype) if proj_size else None
    return LayerWeights(ih, hh, torch.zeros(rows), torch.zeros(rows), weight_hr)._replace(**changes)


def make_call(mode="GRU", directions=1, proj_size=0) -> dict[str, Any]:
    sizes = [proj_size or H, H] if mode == "LSTM" else [H]
    return {
        "x": torch.zeros(4 * B, I),
        "states": [torch.zeros(directions, B, size) for size in sizes],
        "directions": [make_weights(mode, proj_size) for _ in range(directions)],
        "batch_sizes": None,
        "mode": mode,
    }


@pytest.mark.parametrize("sizes", [[3], [3, 3], [3, 2, 2, 1]])
def test_batch_sizes_of_a_packed_sequence(sizes):
    check_batch_sizes(torch.tensor(sizes), sum(sizes), 3)


@pytest.mark.parametrize(
    ("sizes", "rows", "message"),
    [
        (torch.tensor([], dtype=torch.int64), 0, "Expected sequence length to be larger than 0"),
        (torch.tensor([2, 2]), 4, r"must begin with the batch size 3, .* got \[2, 2\]$"),
        (torch.tensor([3, 1, 2]), 6, "never increase"),
        (torch.tensor([3, 2, 0]), 5, "stay positive"),
        (torch.tensor([3, 3, -1]), 5, "stay positive"),
        (torch.tensor([3, 2]), 6, "add up to the 6 rows of data"),
        (torch.tensor([3, 2]), 4, "add up to the 4 rows of data"),
        (torch.full((20,), 3), 1, r"got \[3, 3, 3, 3, 3, 3, 3, 3\] and so on$"),
        (torch.tensor([3, 2], dtype=torch.int32), 5, r"a vector of int64 on the CPU, got torch.int32"),
        (torch.tensor([3.0, 2.0]), 5, "got torch.float32"),
        (torch.tensor([[3, 2]]), 5, r"of shape \(1, 2\)"),
        (torch.tensor(3), 3, r"of shape \(\)"),
        (torch.tensor([3, 2], device="meta"), 5, "on meta"),
    ],
)
def test_other_batch_sizes(sizes, rows, message):
    with pytest.raises(RuntimeError, match=message):
        check_batch_sizes(sizes, rows, 3)


@pytest.mark.parametrize("mode", GATES)
@pytest.mark.parametrize("directions", [1, 2])
def test_calls_that_fit(mode, directions):
    call = make_call(mode, directions)
    check_call(**call)
    check_call(**{**call, "batch_sizes": torch.tensor([3, 3, 2, 2, 1, 1])})
    check_call(**{**call, "x": torch.zeros(I, 4 * B).t(), "states": [s.mT.contiguous().mT for s in call["states"]]})
    empty = [state[:, :0] for state in call["states"]]
    check_call(**{**call, "x": call["x"][:0], "states": empty})
    check_weights(call["directions"], mode, I, torch.float32, CPU)
    check_weights([make_weights(mode, bias_ih=None, bias_hh=None)], mode, I, torch.float32, CPU)


def test_a_projection_fits():
    check_call(**make_call("LSTM", 2, P))


@pytest.mark.parametrize(
    ("mode", "change", "message"),
    [
        ("GRU", {"x": torch.zeros(4 * B, I + 1)}, rf"x must be \[N, {I}\], got \(12, 5\)"),
        ("GRU", {"x": torch.zeros(4, B, I)}, r"x must be \[N, 4\], got \(4, 3, 4\)"),
        ("GRU", {"x": torch.zeros(4 * B + 1, I)}, "x must hold whole steps of 3 rows, got 13 rows"),
        ("GRU", {"states": [torch.zeros(1, 0, H)]}, "x must hold whole steps of 0 rows, got 12 rows"),
        ("GRU", {"x": torch.zeros(4 * B, I).double()}, "states must be torch.float64"),
        ("GRU", {"states": [torch.zeros(1, B, H)] * 2}, "states must be 1 tensors for GRU, got 2"),
        ("LSTM", {"states": [torch.zeros(1, B, H)]}, "states must be 2 tensors for LSTM, got 1"),
        ("LSTM", {"states": [torch.zeros(1, B, H), torch.zeros(1, B, P)]}, r"shape \(1, 3, 5\) .* got .* \(1, 3, 2\)"),
        ("LSTM", {"states": [torch.zeros(1, B, H), torch.zeros(1, B + 1, H)]}, r"got .* of shape \(1, 4, 5\)"),
        ("GRU", {"states": [torch.zeros(2, B, H)]}, r"states must be .* shape \(1, 3, 5\) .* got .* \(2, 3, 5\)"),
        ("GRU", {"states": [torch.zeros(B, H)]}, r"states must be .* got .* \(3, 5\)"),
        ("GRU", {"states": [torch.zeros(1, B, H, device="meta")]}, "states must be .* on cpu, got .* on meta"),
        ("GRU", {"states": [torch.zeros(1, B, H).half()]}, "states must be torch.float32 .* got torch.float16"),
    ],
)
def test_calls_that_do_not_fit(mode, change, message):
    with pytest.raises(ValueError, match=message):
        check_call(**{**make_call(mode), **change})


def test_packed_calls_that_do_not_fit():
    with pytest.raises(RuntimeError, match="batch_sizes must begin with the batch size 3"):
        check_call(**{**make_call(), "batch_sizes": torch.tensor([4, 4, 4])})


def spread(tensor: Tensor) -> Tensor:
    """The same values with a gap behind each."""
    return torch.stack([tensor, tensor], -1)[..., 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {"bias_ih": w.bias_ih.double()}, r"bias_ih must be torch.float32 of shape \(15,\) .* torch.float64"),
        (lambda w: {"bias_hh": w.bias_hh[1:]}, r"bias_hh must be .* got torch.float32 of shape \(14,\)"),
        (lambda w: {"bias_hh": spread(w.bias_hh)}, r"bias_hh must be contiguous, got strides \(2,\)"),
        (lambda w: {"bias_ih": w.bias_ih.to("meta")}, "bias_ih must be .* on meta"),
        (
            lambda w: {"weight_hr": BlockMatrix.from_dense(torch.ones(H, H + 1), (2, 1))},
            r"weight_hr must be of shape \(5, 5\), got \(5, 6\)",
        ),
        (lambda w: {"weight_hh": moved(w.weight_hh, "meta")}, "weight_hh must be on cpu, got meta"),
        (lambda w: {"weight_ih": changed(w.weight_ih, values=spread(w.weight_ih.values))}, "must be contiguous"),
        (
            lambda w: {"weight_hh": changed(w.weight_hh, columns=w.weight_hh.columns.long())},
            "columns must be torch.int32",
        ),
        (lambda w: {"weight_hh": changed(w.weight_hh, starts=w.weight_hh.starts[1:])}, "do not fit together"),
        (lambda w: {"weight_hh": changed(w.weight_hh, starts=None)}, "starts must not be None beside blocks"),
        (
            lambda w: {"weight_ih": changed(w.weight_ih, values=w.weight_ih.values.to(torch.int8))},
            "scales must not be None",
        ),
    ],
)
def test_weights_that_do_not_fit(change, message):
    weights = make_weights()
    wrong = weights._replace(**change(weights))
    for check in (
        lambda: check_weights([weights, wrong], "GRU", I, torch.float32, CPU),
        lambda: check_call(**{**make_call(directions=2), "directions": [weights, wrong]}),
    ):
        with pytest.raises(ValueError, match=message):
            check()


@pytest.mark.parametrize("bad", [0, 1])
def test_a_dense_input_weight(bad):
    good = make_weights(weight_ih=torch.zeros(3 * H, I))
    call = {**make_call(directions=2), "directions": [good, make_weights()]}
    check_call(**call)
    check_weights([good], "GRU", I, torch.float32, CPU)
    for wrong, message in (
        (torch.zeros(3 * H, I).double(), "weight_ih must be torch.float32 of shape .* got torch.float64"),
        (torch.zeros(3 * H, I + 1), r"x must be \[N, 5\]|weight_ih must be .* \(15, 4\) .* got .* \(15, 5\)"),
        (torch.zeros(3 * H + 1, I), r"weight_ih must be .* got .* \(16, 4\)"),
        (torch.zeros(3 * H), r"x must be \[N, \]|weight_ih must be .* got .* \(15,\)"),
        (torch.zeros(I, 3 * H).t(), "weight_ih must be contiguous"),
        (torch.zeros(3 * H, I, device="meta"), "weight_ih must be .* on meta"),
    ):
        directions = [good, good]
        directions[bad] = good._replace(weight_ih=wrong)
        with pytest.raises(ValueError, match=message):
            check_call(**{**call, "directions": directions})
        with pytest.raises(ValueError, match=message):
            check_weights(directions, "GRU", I, torch.float32, CPU)


def test_quantized_activations_need_int8_weights_everywhere():
    floats, int8 = (make_weights("LSTM", P, dtype) for dtype in (None, torch.int8))
    layer = "LSTM", I, torch.float32, CPU
    check_weights([int8, int8], *layer, activation_dtype=torch.int8)
    for name in ("weight_ih", "weight_hh", "weight_hr"):
        mixed = [int8, int8._replace(**{name: getattr(floats, name)})]
        check_weights(mixed, *layer)
        with pytest.raises(ValueError, match=r"needs weights in torch.int8, got torch.float32; give weight_dtype="):
            check_weights(mixed, *layer, activation_dtype=torch.int8)
    with pytest.raises(ValueError, match=r"activation_dtype must be None or torch.int8, got torch.bfloat16"):
        check_activation_dtype(torch.bfloat16, torch.int8)


@pytest.mark.parametrize("wrong", [True, 1.0, "2", None])
def test_threads_of_another_type(wrong):
    with pytest.raises(TypeError, match="num_threads must be an integer, got"):
        check_num_threads(wrong)


def test_numbers_of_threads():
    numbers: list[Any] = [1, 7, np.int64(3)]
    assert [check_num_threads(n) for n in numbers] == [1, 7, 3]
    assert type(check_num_threads(numbers[2])) is int
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"num_threads must be at least 1, got {wrong}"):
            check_num_threads(wrong)


def test_indices_are_read_again_only_after_a_write(monkeypatch):
    """The operator asks at every call, and reading them takes as long as a small layer."""
    weights = make_weights()
    read = []
    check_indices = BlockMatrix._check_indices
    monkeypatch.setattr(BlockMatrix, "_check_indices", lambda *args: (read.append(1), check_indices(*args)))

    def check(indices: bool) -> int:
        read.clear()
        check_weights([weights], "GRU", I, torch.float32, CPU, indices=indices)
        return len(read)

    assert [check(False), check(False), check(True)] == [2, 0, 2]
    weights.weight_hh.columns[-1] += 0
    assert [check(False), check(False)] == [1, 0]
    weights.weight_hh.starts.add_(0)
    assert [check(False), check(False)] == [1, 0]


def free(tensor: Tensor, left_bytes: int = 0) -> None:
    tensor.untyped_storage().resize_(left_bytes)


@pytest.mark.parametrize("left_bytes", [0, 15])
def test_tensors_without_memory(left_bytes):
    for tensor in (torch.ones(4), torch.ones(3, 4)[::2, 2:], torch.ones(9)[5:], torch.ones(4).requires_grad_()):
        check_memory("x", tensor)
        check_memory("x", tensor[:0])
        free(tensor, left_bytes)
        with pytest.raises(RuntimeError, match=rf"x has no memory .* and its storage has {left_bytes}; was it freed"):
            check_memory("x", tensor)
        check_memory("x", tensor[:0])
    cut = torch.ones(10)[::3]
    free(cut, 40)
    check_memory("x", cut)
    free(cut, 39)
    with pytest.raises(RuntimeError, match=r"strides \[3\], storage offset 0, and itemsize 4 require a storage of 40"):
        check_memory("x", cut)
    with pytest.raises(RuntimeError, match="x has no memory"):
        check_memory("x", torch._efficientzerotensor((3,)))  # type: ignore[attr-defined]


def test_tensors_that_have_no_addresses():
    for tensor in (torch.ones(3, device="meta"), torch.eye(3).to_sparse(), torch.ones(3).to_mkldnn()):
        check_memory("x", tensor)
    torch.vmap(lambda x: check_memory("x", x) or x)(torch.ones(2, 3))  # type: ignore[func-returns-value]


FREED = {
    "x": lambda call: call["x"],
    "states": lambda call: call["states"][-1],
    "weight_hh_values": lambda call: call["directions"][1].weight_hh.values,
    "weight_ih_columns": lambda call: call["directions"][0].weight_ih.columns,
    "weight_hr_starts": lambda call: call["directions"][1].weight_hr.starts,
    "weight_hh_scales": lambda call: call["directions"][1].weight_hh.scales,
    "bias_ih": lambda call: call["directions"][1].bias_ih,
}


@pytest.mark.parametrize("name", FREED)
def test_arguments_without_memory(name):
    call = make_call("LSTM", 2, P)
    call["directions"] = [make_weights("LSTM", P, dtype=torch.int8) for _ in range(2)]
    check_call(**call)
    free(FREED[name](call), 2)
    with pytest.raises(RuntimeError, match=f"{name} has no memory"):
        check_call(**call)


@pytest.mark.parametrize("size", [H - 1, H + 1])
def test_a_state_of_another_size_is_not_read_past_its_end(size):
    """The columns of weight_hh are taken from the state: blocks made for H columns would reach past a narrower one."""
    weights = make_weights()
    reshaped = weights._replace(weight_hh=changed(weights.weight_hh, shape=(3 * H, size)))
    call = {**make_call(), "directions": [reshaped], "states": [torch.zeros(1, B, size)]}
    with pytest.raises(ValueError, match=f"states must end in hidden_size 5, got {size}"):
        check_call(**call)


def changed(matrix: BlockMatrix, **parts: Any) -> BlockMatrix:
    names = ("values", "columns", "starts", "shape", "gates", "scales")
    return BlockMatrix(**{**{name: getattr(matrix, name) for name in names}, **parts})


def moved(matrix: BlockMatrix, device: str) -> BlockMatrix:
    parts = {name: getattr(matrix, name).to(device) for name in ("values", "columns", "starts")}
    return changed(matrix, **parts)
