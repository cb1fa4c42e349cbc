"""The call of the persistent modules against torch.nn's: arguments in every form, results, errors."""

from typing import Any

import pytest
import torch
from persistent_cases import (
    CELLS,
    assert_as_exact_as_nn,
    assert_same_bits,
    convert,
    each_backend,
    every_cell_and_backend,
    every_cell_on_the_cpu,
    make_pruned,
    make_states,
    tensors_of,
)
from processor import skip_where_torch_cannot_autocast
from rounding import assert_same_sums, terms_of
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

from triton_sparse_rnn.kernels.triton.exchange import INTERPRETED

OPTIONS: list[dict[str, Any]] = [
    {"num_layers": layers, "bidirectional": bidirectional, "batch_first": batch_first, "bias": bias}
    # Every pair of choices, among them the plain ones, and each with each other.
    for layers, bidirectional, batch_first, bias in [
        (1, False, False, True),
        (1, True, True, True),
        (1, False, True, False),
        (3, False, True, True),
        (3, True, False, True),
        (3, True, True, False),
        (1, True, False, False),
    ]
]


def make_inputs(form: str, I=5) -> tuple[Any, int | None]:
    """An input and its B, None where it is unbatched."""
    if form == "packed":
        return pack_sequence([torch.randn(t, I) for t in (2, 6, 1, 3)], enforce_sorted=False), 4
    if form == "packed sorted":
        return pack_sequence([torch.randn(t, I) for t in (6, 3, 3)]), 3
    if form == "unbatched":
        return torch.randn(6, I), None
    if form == "strided":
        return torch.randn(I, 4, 12).permute(2, 1, 0)[::2], 4
    if form == "one":
        return torch.randn(1, 1, I), 1
    return torch.randn(6, 4, I), 4


@every_cell_on_the_cpu
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k[:3]}{int(v)}" for k, v in o.items()))
def test_every_form_of_a_call(cell, backend, options):
    check_forms_of_a_call(cell, backend, options, ("batched", "packed", "packed sorted", "unbatched", "strided", "one"))


@pytest.mark.skipif(not INTERPRETED, reason="backend 'triton' takes no tensors on the CPU")
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("form", ["packed", "unbatched"])
def test_some_forms_of_a_call_interpreted(cell, form):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": form == "packed"}
    check_forms_of_a_call(cell, "triton", options, (form,))


def check_forms_of_a_call(cell, backend, options, forms):
    if cell is nn.RNN and not options["bias"]:
        options = {**options, "nonlinearity": "relu"}
    layer = make_pruned(cell, **options)
    ours = convert(layer, backend)
    for form in forms:
        x, B = make_inputs(form)
        if options["batch_first"] and form in ("batched", "strided"):
            B = 6
        assert_as_exact_as_nn(ours(x), layer, x)
        hx = make_states(layer, B)
        before = [h.clone() for h in tensors_of(hx)]
        assert_as_exact_as_nn(ours(x, hx), layer, x, hx)
        assert_same_bits(before, hx)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # said of nn.LSTM
@pytest.mark.parametrize("proj_size", [0, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_lstm_with_projection_and_lists(proj_size, bidirectional):
    layer = make_pruned(nn.LSTM, num_layers=2, proj_size=proj_size, bidirectional=bidirectional)
    ours = convert(layer)
    for form in ("batched", "packed", "unbatched"):
        x, B = make_inputs(form)
        hx = list(make_states(layer, B))
        assert_as_exact_as_nn(ours(x, hx), layer, x, hx)
        assert isinstance(ours(x, hx)[1], tuple)


@every_cell_and_backend
def test_inputs_and_states_of_any_strides(cell, backend):
    """To the bit, for products are given them contiguous. The last one begins where no vector would."""
    layer = make_pruned(cell, num_layers=2)
    ours = convert(layer, backend)
    x = torch.randn(3, 4, 5)
    parts = [torch.randn(7, 4, 4)[:, :, ::2].permute(2, 1, 0) for _ in range(2)]
    hx = tuple(parts) if cell is nn.LSTM else parts[0]
    expected = ours(x, tuple(p.contiguous() for p in parts) if cell is nn.LSTM else parts[0].contiguous())
    assert_same_bits(ours(x, hx), expected)
    by_columns = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    with_gaps = torch.stack([x, x], -1)[..., 0]
    rows_apart = torch.cat([x, x], -1)[..., :5]
    offset = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(3, 4, 5)
    for strided in (by_columns, offset) if backend == "triton" else (by_columns, with_gaps, rows_apart, offset):
        assert_same_bits(ours(strided, hx), expected)
    if backend != "triton":
        assert_same_bits(ours(x[:1, :1].expand(3, 4, 5)), ours(x[:1, :1].repeat(3, 4, 1)))


@every_cell_and_backend
@pytest.mark.parametrize("batch_first", [False, True])
def test_empty_batch(cell, backend, batch_first):
    layer = make_pruned(cell, num_layers=2, bidirectional=True, batch_first=batch_first)
    ours = convert(layer, backend)
    x = torch.randn(0, 3, 5) if batch_first else torch.randn(3, 0, 5)
    for hx in (None, make_states(layer, 0), None):
        for a, b in zip(tensors_of(ours(x, hx)), tensors_of(layer(x, hx)), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert convert(make_pruned(cell), backend).step(torch.randn(0, 5))[0].shape == (0, 7)


@every_cell_and_backend
def test_packed_sequence_keeps_its_indices(cell, backend):
    layer = make_pruned(cell, batch_first=True)
    x, _ = make_inputs("packed")
    theirs, ours = layer(x)[0], convert(layer, backend)(x)[0]
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    padded, lengths = pad_packed_sequence(ours, batch_first=True)
    assert padded.shape == (4, 6, 7)
    assert lengths.tolist() == [2, 6, 1, 3]


def outcome(call, *arguments):
    try:
        call(*arguments)
    except Exception as error:
        return type(error), str(error)
    return None, ""


def states(cell, *shape, **options):
    h = torch.zeros(shape, **options)
    return (h, h) if cell is nn.LSTM else h


X = torch.zeros(5, 3, 4)
PACKED = pack_sequence([torch.zeros(3, 4), torch.zeros(2, 4)])
WRONG_CALLS: dict[str, Any] = {
    "0-D": lambda cell: (torch.tensor(1.0),),
    "1-D": lambda cell: (torch.zeros(4),),
    "4-D": lambda cell: (torch.zeros(1, 2, 3, 4),),
    "list": lambda cell: ([1.0],),
    "int": lambda cell: (X.long(),),
    "bool": lambda cell: (X.bool(),),
    "float64": lambda cell: (X.double(),),
    "bfloat16": lambda cell: (X.bfloat16(),),
    "input size": lambda cell: (torch.zeros(5, 3, 6),),
    "input size unbatched": lambda cell: (torch.zeros(5, 6),),
    "T=0": lambda cell: (torch.zeros(0, 3, 4),),
    "T=0 unbatched": lambda cell: (torch.zeros(0, 4),),
    "T=0 B=0": lambda cell: (torch.zeros(0, 0, 4),),
    "T=0 and hidden size": lambda cell: (torch.zeros(0, 3, 4), states(cell, 2, 4, 8)),
    "2-D hx": lambda cell: (X, states(cell, 2, 8)),
    "1-D hx": lambda cell: (X, states(cell, 8)),
    "4-D hx": lambda cell: (X, states(cell, 2, 3, 8, 1)),
    "3-D hx unbatched": lambda cell: (X[:, 0], states(cell, 2, 1, 8)),
    "hidden B": lambda cell: (X, states(cell, 2, 4, 8)),
    "hidden H": lambda cell: (X, states(cell, 2, 3, 9)),
    "hidden L": lambda cell: (X, states(cell, 1, 3, 8)),
    "hidden H unbatched": lambda cell: (X[:, 0], states(cell, 2, 9)),
    "hidden device": lambda cell: (X, states(cell, 2, 3, 8, device="meta")),
    "input device": lambda cell: (X.to("meta"),),
    "dtype before size": lambda cell: (torch.zeros(5, 3, 6).double(), states(cell, 2, 4, 8)),
}
WRONG_PACKED: dict[str, Any] = {
    "packed float64": lambda cell: (PACKED.double(),),
    "packed input size": lambda cell: (pack_sequence([torch.zeros(3, 6)]),),
    "packed hidden B": lambda cell: (PACKED, states(cell, 2, 3, 8)),
    "packed 2-D hx": lambda cell: (PACKED, states(cell, 2, 8)),
    "packed 3-D rows": lambda cell: (pack_sequence([torch.zeros(3, 4, 1)]),),
}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("case", [*WRONG_CALLS, *WRONG_PACKED])
def test_errors_are_those_of_torch_nn(case, cell):
    if cell is nn.LSTM and case in WRONG_PACKED:
        pytest.skip("nn.LSTM does not check packed input: it fails inside, or takes the wrong size")
    layer = make_pruned(cell, 4, 8, num_layers=2)
    arguments = {**WRONG_CALLS, **WRONG_PACKED}[case](cell)
    wanted = outcome(layer, *arguments)
    assert wanted[0] is not None
    module = convert(layer)
    ours = outcome(module, *arguments)
    assert ours[0] is wanted[0]
    assert ours[1].split()[:8] == wanted[1].split()[:8]
    module.warm_up()
    assert outcome(module, *arguments) == ours


@pytest.mark.parametrize("case", WRONG_PACKED)
def test_packed_input_of_an_lstm_is_checked(case):
    ours = convert(make_pruned(nn.LSTM, 4, 8, num_layers=2))
    error, message = outcome(ours, *WRONG_PACKED[case](nn.LSTM))
    assert error in (RuntimeError, ValueError)
    assert any(words in message for words in ("RNN input dtype", "input.size(-1)", "Expected hidden[0]", "dimensions"))


@each_backend
def test_packed_sequences_written_by_hand_are_checked(cell, backend):
    ours, order = convert(make_pruned(cell), backend), torch.arange(3)
    for sizes in ([2, 3], [3, 1], []):  # every wrong kind has its test in tests/ops/test_validation.py
        packed = PackedSequence(torch.zeros(5, 5), torch.tensor(sizes, dtype=torch.int64), order, order)
        with pytest.raises(RuntimeError, match=r"batch_sizes must begin with the batch size 3|sequence length"):
            ours(packed)


@every_cell_and_backend
def test_batch_sizes_of_any_strides(cell, backend):
    layer, x, spread = make_pruned(cell), torch.randn(5, 5), torch.tensor([3, 9, 2, 9])[::2]
    packed = PackedSequence(x, spread)
    assert_as_exact_as_nn(convert(layer, backend)(packed), layer, PackedSequence(x, spread.contiguous()))


H0 = torch.zeros(2, 3, 8)


@pytest.mark.parametrize(
    ("cell", "hx", "error", "message"),
    [
        (nn.GRU, (H0, H0), TypeError, "hx must be a tensor, got tuple"),
        (nn.GRU, (), TypeError, "hx must be a tensor, got tuple"),
        (nn.RNN, 3, TypeError, "hx must be a tensor, got int"),
        (nn.LSTM, 3, TypeError, "hx must be a pair of tensors .* got int"),
        (nn.LSTM, H0, TypeError, "hx must be a pair of tensors .* got Tensor"),
        (nn.LSTM, (H0,), TypeError, "hx must be a pair of tensors .* got tuple"),
        (nn.LSTM, (None, None), TypeError, "hx must be a pair of tensors .* got tuple"),
        (nn.LSTM, (H0, H0[:, :, :7]), RuntimeError, r"Expected hidden\[1\] size \(2, 3, 8\), got \[2, 3, 7\]"),
        (nn.LSTM, (H0, H0[0]), RuntimeError, r"For batched 3-D input, hx and cx .* \(3-D, 2-D\)"),
        (nn.LSTM, (H0, H0.to("meta")), RuntimeError, "Input and hidden tensors are not at the same device"),
        (nn.RNN, H0.long(), RuntimeError, "Input and hidden tensors are not the same dtype, .* torch.int64"),
        (nn.GRU, H0.double(), RuntimeError, "Input and hidden tensors are not the same dtype, .* torch.float64"),
        (nn.LSTM, (H0, H0.bfloat16()), RuntimeError, "Input and hidden tensors are not the same dtype, .*bfloat16"),
    ],
)
def test_hx_of_another_kind(cell, hx, error, message):
    ours = convert(make_pruned(cell, 4, 8, num_layers=2))
    for _ in range(2):
        with pytest.raises(error, match=message):
            ours(X, hx)
        ours.warm_up()


@pytest.mark.parametrize(
    ("x", "hx", "error", "message"),
    [
        (torch.zeros(2, 3, 4), None, ValueError, r"Expected input of step\(\) to be 1D or 2D, got 3D"),
        (torch.zeros(3, 6), None, RuntimeError, r"input.size\(-1\) must be equal to input_size. Expected 4, got 6"),
        (torch.zeros(3, 4).int(), None, ValueError, "RNN input dtype .torch.int32. does not match"),
        (torch.zeros(3, 4), torch.zeros(2, 2, 8), RuntimeError, r"Expected hidden size \(2, 3, 8\), got \[2, 2, 8\]"),
        (torch.zeros(3, 4), torch.zeros(2, 8), RuntimeError, "For batched 3-D input, hx should also be 3-D"),
        (torch.zeros(4), torch.zeros(2, 1, 8), RuntimeError, "For unbatched 2-D input, hx should also be 2-D"),
    ],
)
def test_wrong_arguments_of_step(x, hx, error, message):
    ours = convert(make_pruned(nn.GRU, 4, 8, num_layers=2))
    for _ in range(2):
        with pytest.raises(error, match=message):
            ours.step(x, hx)
        ours.warm_up()


def test_step_needs_one_direction():
    with pytest.raises(RuntimeError, match="needs one direction, but this layer is bidirectional"):
        convert(make_pruned(nn.GRU, 4, 8, bidirectional=True)).step(torch.zeros(3, 4))


@every_cell_and_backend
@pytest.mark.parametrize("B", [None, 1, 3])
def test_step_by_step_is_the_whole_call(cell, backend, B):
    layer = make_pruned(cell, num_layers=2, batch_first=True)
    ours = convert(layer, backend)
    x = torch.randn(6, *([] if B is None else [B]), 5)
    start = make_states(layer, B)
    before = [h.clone() for h in tensors_of(start)]
    y, hx = ours(x if B is None else x.transpose(0, 1), start)
    steps, h = [], start
    for x_t in x:
        y_t, h = ours.step(x_t, h)
        steps.append(y_t)
    assert_same_bits(before, start)
    y = y if B is None else y.transpose(0, 1)
    assert_same_sums([torch.stack(steps), *tensors_of(h)], [y, *tensors_of(hx)], terms_of(layer))
    assert_same_bits(ours.step(x[0])[0], ours.step(x[0], [torch.zeros_like(t) for t in tensors_of(start)])[0])


@every_cell_and_backend
def test_negative_views_are_resolved(cell, backend):
    """x.conj().imag is -x.imag without a copy: the numbers in memory have the other sign."""
    ours = convert(make_pruned(cell, num_layers=2), backend)
    x, hx = torch.randn(4, 2, 5), make_states(ours, 2)

    def flip(tensor):
        flipped = torch.complex(tensor, tensor).conj().imag
        assert flipped.is_neg()
        return flipped

    flipped = tuple(map(flip, hx)) if cell is nn.LSTM else flip(hx)
    negated = tuple(-h for h in hx) if cell is nn.LSTM else -hx
    assert_same_bits(ours(flip(x), flipped), ours(-x, negated))
    assert_same_bits(ours.step(flip(x[0]), flipped), ours.step(-x[0], negated))
    contiguous = vars(torch)["_neg_view"](x)
    assert contiguous.is_contiguous()
    assert_same_bits(ours(contiguous), ours(-x))


TRANSFORMS: dict[str, Any] = {
    "jvp": lambda call, x: torch.func.jvp(call, (x,), (torch.ones_like(x),)),
    "jacfwd": lambda call, x: torch.func.jacfwd(call)(x),
    "grad": lambda call, x: torch.func.grad(lambda x: call(x).sum())(x),
    "vjp": lambda call, x: torch.func.vjp(call, x),
    "vmap": lambda call, x: torch.func.vmap(call)(torch.stack([x, x])),
    "jvp of vmap": lambda call, x: torch.func.jvp(torch.func.vmap(call), (x[None],), (x[None],)),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch uses it for forward-mode AD
@each_backend
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_functions_raise(cell, backend, transform):
    ours = convert(make_pruned(cell), backend)
    x = torch.randn(4, 2, 5)
    ours(x)
    for call in (lambda x: ours(x)[0], lambda x: ours.step(x[0])[0]):
        with pytest.raises(RuntimeError, match=r"no derivatives|setup_context|Batching rule not implemented"):
            TRANSFORMS[transform](call, x)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch uses it for forward-mode AD
@every_cell_and_backend
def test_forward_mode_tangents_raise(cell, backend):
    ours = convert(make_pruned(cell), backend)
    x, hx = torch.randn(4, 2, 5), make_states(ours, 2)
    expected = ours(x, hx)
    with forward_ad.dual_level():
        assert_same_bits(ours(x, hx), expected)
        dual_x = forward_ad.make_dual(x, torch.ones_like(x))
        *others, last = tensors_of(hx)
        dual_states = [*others, forward_ad.make_dual(last, torch.ones_like(last))]
        dual_hx = tuple(dual_states) if cell is nn.LSTM else dual_states[0]
        for arguments in ((dual_x,), (x, dual_hx)):
            with pytest.raises(RuntimeError, match=r"converted by to_sparse\(\) and has no derivatives, forward-mode"):
                ours(*arguments)
        with torch.no_grad(), pytest.raises(RuntimeError, match="has no derivatives, forward-mode"):
            ours.step(dual_x[0])


AUTOCAST_CASES = [
    (weights, x, h)
    for weights in (torch.float32, torch.bfloat16, torch.float64)
    for x in (torch.float32, torch.bfloat16, torch.float64, torch.int64)
    for h in (None, torch.float32, torch.bfloat16, torch.float64)
]


@pytest.mark.parametrize("cell", CELLS)
def test_autocast_gives_the_dtypes_of_torch_nn(cell):
    """bfloat16 only: nn.LSTM on the CPU cannot run under float16 autocast."""
    skip_where_torch_cannot_autocast(cell)
    narrow = [] if cell is nn.LSTM else [(torch.float32, torch.float16, None)]  # oneDNN has rules of its own there
    for weight_dtype, x_dtype, h_dtype in AUTOCAST_CASES + narrow:
        layer = make_pruned(cell, dtype=weight_dtype)
        x = torch.randn(6, 3, 5).to(x_dtype)
        hx = None if h_dtype is None else make_states(layer, 3, h_dtype)
        ours = convert(layer)
        ours.warm_up()
        with torch.autocast("cpu", torch.bfloat16):
            try:
                theirs = tensors_of(layer(x, hx))
            except RuntimeError:
                with pytest.raises((RuntimeError, ValueError), match="dtype"):
                    ours(x, hx)
                continue
            result = tensors_of(ours(x, hx))
        for a, b in zip(result, theirs, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0, atol=0.03)
