import copy
import dataclasses
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from triton_sparse_rnn.conversion import to_sparse
from triton_sparse_rnn.report import sparsity_report
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.patterns import Blocks, Pattern
from triton_sparse_rnn.sparse.picks import Picks


def pruned(layer: nn.Module, share: float = 0.8) -> nn.Module:
    """Zero whole columns of every matrix; every 10th column at least stays."""
    for name, weight in layer.named_parameters():
        if "weight" in name:
            weight.data[:, torch.arange(weight.shape[1]) % 10 < 10 * share] = 0
    return layer


@pytest.mark.parametrize(
    ("layer", "gates"), [(nn.RNN(20, 18), "h"), (nn.GRU(20, 18), "rzn"), (nn.LSTM(20, 18), "ifgo")]
)
def test_each_gate_is_counted_by_itself(layer: nn.RNNBase, gates: str):
    weight = layer.get_parameter("weight_hh_l0")
    weight.data[:9, 3:] = 0  # half of the first gate
    report = sparsity_report(layer)
    assert [weight.name for weight in report.weights] == ["weight_ih_l0", "weight_hh_l0"]
    hh = report.weights[1]
    assert [gate.name for gate in hh.gates] == list(gates)
    assert [gate.shape for gate in hh.gates] == [(18, 18)] * len(gates)
    assert hh.gates[0].nonzero == 9 * 18 + 9 * 3
    assert hh.gates[0].density == pytest.approx(hh.gates[0].nonzero / 18**2)
    assert all(gate.density == 1 for gate in hh.gates[1:])
    assert hh.gates[0].stored_units == 2 * 18  # the second row of blocks, 2 units, is kept as is the first
    assert hh.gates[0].multiply_accumulates == 2 * 18 * 16
    assert hh.gates[0].stored_bytes == 2 * 18 * (16 * 4 + 4)
    assert hh.stored_bytes == BlockMatrix.from_dense(weight, (16, 1), gates=len(gates)).nbytes
    assert hh.dense_bytes == 4 * 18 * 18 * len(gates)


def test_totals_are_sums():
    report = sparsity_report(pruned(nn.GRU(20, 32, num_layers=2, bidirectional=True)))
    assert len(report.weights) == 8
    for total in ("nonzero", "stored_bytes", "dense_bytes", "multiply_accumulates", "dense_multiply_accumulates"):
        assert getattr(report, total) == sum(getattr(weight, total) for weight in report.weights)
    assert 0.15 < report.density < 0.25


def test_names_tell_layers_whatever_surrounds_them():
    model = nn.ModuleDict({"a": nn.LSTM(5, 8, proj_size=3, bias=False), "b": nn.GRUCell(5, 8), "c": nn.Linear(4, 4)})
    report = sparsity_report(model)
    assert {weight.name: len(weight.gates) for weight in report.weights} == {
        "a.weight_ih_l0": 4,
        "a.weight_hh_l0": 4,
        "a.weight_hr_l0": 1,
        "b.weight_ih": 3,
        "b.weight_hh": 3,
    }
    assert {tensor.name for tensor in report.others} == {
        "b.bias_ih",
        "b.bias_hh",
        "c.weight",
        "c.bias",
    }
    compiled = sparsity_report({f"_orig_mod.{name}": value for name, value in model.state_dict().items()})
    assert [weight.gates for weight in compiled.weights] == [weight.gates for weight in report.weights]


def test_state_dict_and_module_agree():
    model = pruned(nn.Sequential(nn.GRU(20, 32), nn.Linear(32, 3)))
    assert sparsity_report(model) == sparsity_report(model.state_dict())
    assert sparsity_report({**model.state_dict(), "epoch": 3}) == sparsity_report(model)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.int8])
def test_converted_model_is_reported_as_it_is_stored(weight_dtype: torch.dtype):
    model = pruned(nn.Sequential(nn.GRU(20, 32), nn.Linear(32, 3)))
    converted = to_sparse(model.eval(), include=(), weight_dtype=weight_dtype, storage=(8, 2), backend="reference")
    report = sparsity_report(converted)
    stored = converted[0].stored_weights()["weight_hh_l0"]  # type: ignore[index]
    (hh,) = (weight for weight in report.weights if weight.name == "0.weight_hh_l0")
    assert hh.pattern == Blocks(8, 2)
    assert hh.stored_bytes == stored.nbytes
    assert hh.nonzero == int(stored.to_dense().count_nonzero())
    assert {tensor.name for tensor in report.others} == {"0.bias_ih_l0", "0.bias_hh_l0", "1.weight", "1.bias"}
    if weight_dtype == torch.float32:
        assert report == sparsity_report(model, pattern=(8, 2))


def test_a_converted_layer_that_is_shared():
    layer = pruned(nn.GRU(20, 32))
    shared = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)}).eval()
    assert sparsity_report(to_sparse(shared, storage=(16, 1))) == sparsity_report(shared)


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.int8])
def test_blocks_without_a_layer_are_other_tensors(weight_dtype: torch.dtype):
    weight = pruned(nn.GRU(20, 32)).get_parameter("weight_ih_l0").detach()
    blocks = BlockMatrix.from_dense(weight, (5, 3), gates=3, dtype=weight_dtype)
    assert sparsity_report({"a": blocks}).others == sparsity_report({"a": blocks.to_dense()}).others


def test_a_converted_layer_by_itself():
    layer = pruned(nn.GRU(20, 32))
    assert sparsity_report(to_sparse(layer.eval()), pattern=(16, 1)) == sparsity_report(layer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_dtypes(dtype: torch.dtype):
    state = {name: value.to(dtype) for name, value in pruned(nn.GRU(20, 32)).state_dict().items()}
    report = sparsity_report(state)
    assert report.dense_bytes == 3 * 32 * 52 * dtype.itemsize
    assert report.nonzero < 3 * 32 * 52 * 0.3


@pytest.mark.filterwarnings("ignore:.*little to skip")
def test_a_weight_that_a_converted_layer_keeps_dense():
    layer = pruned(nn.LSTM(20, 32, proj_size=7))
    nn.init.ones_(layer.get_parameter("weight_ih_l0"))
    layer.get_parameter("weight_ih_l0").data[0, 0] = 0
    converted = to_sparse(layer.eval())
    ih, hh, hr = sparsity_report(converted).weights
    assert (ih.pattern, ih.stored_units, ih.half_empty) == (None, 0, None)
    assert ih.stored_bytes == ih.dense_bytes == 4 * 128 * 20
    assert ih.multiply_accumulates == 128 * 20
    assert ih.nonzero == 128 * 20 - 1
    assert [gate.stored_bytes for gate in ih.gates] == [4 * 32 * 20] * 4
    stored = converted.stored_weights()  # type: ignore[operator]
    assert [hh.stored_bytes, hr.stored_bytes] == [stored[name].nbytes for name in ("weight_hh_l0", "weight_hr_l0")]
    assert sum(weight.stored_bytes for weight in (ih, hh, hr)) == converted.nbytes - 2 * 4 * 128  # type: ignore[operator]
    text = str(sparsity_report(converted)).splitlines()
    assert [line.split()[-3:] for line in text if line.startswith("weight_ih_l0")] == [["dense", "10,240", "2,560"]]
    assert sparsity_report({**stored}) == sparsity_report(converted)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize("block_size", [(1, 1), (4, 2), (5, 3), (15, 1)])
@pytest.mark.parametrize("H", [16, 37])
def test_what_16_rows_would_give(weight_dtype: torch.dtype, block_size: tuple[int, int], H: int):
    torch.manual_seed(0)
    layer = pruned(nn.GRU(20, H))
    for weight in (layer.get_parameter("weight_ih_l0"), layer.get_parameter("weight_hh_l0")):
        weight.data *= torch.rand(3, H)[:, :, None].gt(0.7).flatten(0, 1)  # whole rows, few of them in a block of 16
    converted = to_sparse(layer.eval(), storage=block_size, weight_dtype=weight_dtype, backend="reference")
    as_it_would_be, in_picks = (
        to_sparse(layer, storage=storage, weight_dtype=weight_dtype, backend="reference")
        for storage in ((16, block_size[1]), Picks())
    )
    for weight in sparsity_report(converted).weights:
        assert weight.half_empty is not None
        for count, module in zip(weight.half_empty, (converted, as_it_would_be, in_picks), strict=True):
            stored = module.stored_weights()[weight.name]
            assert count.pattern == stored.pattern
            assert count.stored_units == len(stored.values)
            assert count.density == stored.density
            assert count.stored_bytes == stored.nbytes
            assert count.vector_multiply_adds == len(stored.values) * stored.block_size[1]
    assert all(weight.half_empty is None for weight in sparsity_report(as_it_would_be).weights)
    assert "would be" not in str(sparsity_report(as_it_would_be))


MASKS = {
    "picks": lambda weight: Picks().spread(Picks().scores(weight, "l2") > 4, weight),
    "blocks": lambda weight: Blocks().spread(Blocks().scores(weight, "l2") > 5, weight),
    "single weights": lambda weight: weight.abs() > 1.6,
}


def masked(mask: str) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.LSTM(20, 40)
    for weight in (layer.get_parameter("weight_ih_l0"), layer.get_parameter("weight_hh_l0")):
        by_gate = torch.randn(4, 40, weight.shape[1])
        weight.data[:] = (by_gate * MASKS[mask](by_gate)).flatten(0, 1)
    return layer.eval()


@pytest.mark.parametrize("mask", MASKS)
def test_by_default_a_dense_model_is_reported_as_it_would_be_converted(mask: str):
    layer = masked(mask)
    report, converted = sparsity_report(layer), to_sparse(layer, backend="reference")
    assert report == sparsity_report(converted) == sparsity_report(layer.state_dict())
    stored = converted.stored_weights()
    patterns = [stored[name].pattern for name in ("weight_ih_l0", "weight_hh_l0")]
    assert [weight.pattern for weight in report.weights] == patterns
    assert patterns[1] == (Blocks() if mask == "blocks" else Picks())


@pytest.mark.filterwarnings("ignore:.*little to skip")
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize("storage", [Picks(), Picks(8, 16, 2), Picks(16, 64, 4), Blocks(16, 1), Blocks(24, 3)], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_in_every_storage(mask: str, storage: Pattern, weight_dtype: torch.dtype):
    layer = masked(mask)
    converted = to_sparse(layer, storage=storage, weight_dtype=weight_dtype, backend="reference")
    report, stored = sparsity_report(converted), converted.stored_weights()
    for weight in report.weights:
        values = stored[weight.name].values
        assert (weight.pattern, weight.stored_units) == (storage, len(values))
        assert (weight.stored_bytes, weight.multiply_accumulates) == (stored[weight.name].nbytes, values.numel())
        assert weight.stored_zeros == values.eq(0).sum()
    assert report.stored_zeros == sum(weight.stored_zeros for weight in report.weights)
    if weight_dtype == torch.float32:
        assert report == sparsity_report(layer, pattern=storage)


def test_lines_about_picks():
    layer = nn.GRU(2, 32, bias=False)
    for weight in layer.parameters():
        weight.data[1:] = 0  # one row: 15 of 16 weights are zeros
    assert str(sparsity_report(layer, pattern=Picks(bank=16, columns=2))).splitlines()[-5:] == [
        "Recurrent layers: 1.0% dense, 34 non-zero weights.",
        "  bytes     2,996 stored, 13,056 dense (4.36x)",
        "  MAC/step  544 stored, 3,264 dense (6.00x)",
        "  zeros     510 among the stored weights (93.8%)",
        "A picked unit of 16x2 in 16: 16 hidden units, 2 weights of each, from its own out of 16 neighbouring columns.",
    ]
    assert "zeros  " not in str(sparsity_report(nn.GRU(2, 32), pattern=(16, 1)))
    assert "on a GPU" not in str(sparsity_report(layer, pattern=Picks())).lower()


def test_lines_about_half_empty():
    layer = nn.GRU(4, 32, bias=False)
    nn.init.zeros_(layer.get_parameter("weight_ih_l0"))
    layer.get_parameter("weight_hh_l0").data[1:] = 0  # one row
    text = str(sparsity_report(layer, pattern=(4, 1)))
    assert text.endswith(
        """
Units take as many vector multiply-adds as those of the next multiple of 16 rows, and blocks on a GPU as many bytes:
weight                               stored  of all  bytes  vector MAC/step
weight_ih_l0                0 blocks of 4x1    0.0%    100                0
  would be                 0 blocks of 16x1    0.0%     28                0
  would be     0 picked units of 16x1 in 32    0.0%    104                0
weight_hh_l0               32 blocks of 4x1    4.2%    740               32
  would be                32 blocks of 16x1   16.7%  2,204               32
  would be    32 picked units of 16x1 in 32   16.7%  2,792               32

On a GPU each gate of 16 units takes as long as the one with the most blocks; a Pruner with balanced=True makes them \
equal (accuracy not measured):
  weight_hh_l0  6.00 times the mean"""
    )


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("block_size", [(16, 1), (16, 4), (4, 1), (24, 3)])
def test_the_fullest_gate_of_a_unit_group(weight_dtype: torch.dtype, block_size: tuple[int, int]):
    layer = nn.LSTM(4, 48, 2, bias=False)
    for name, weight in layer.named_parameters():
        weight.data[(slice(None), slice(12, None)) if "hh" in name else slice(1, None)] = 0
    layer.get_parameter("weight_hh_l1").data.view(4, 48, 48)[2, :24, :36] = 1
    converted = to_sparse(layer.eval(), storage=block_size, weight_dtype=weight_dtype, backend="reference")
    report = sparsity_report(converted)
    fullest = {weight.name: weight.fullest_group for weight in report.weights}
    assert fullest["weight_hh_l0"] == 1
    assert fullest["weight_hh_l1"] == 36 / (12 + 24 * 2 / 12)  # 2 of 12 have 24 more
    assert str(report).endswith("makes them equal (accuracy not measured):\n  weight_hh_l1  2.25 times the mean")
    assert str(report).count("times the mean") == 1  # input weights are not multiplied step by step


def test_no_blocks_are_even():
    layer = nn.GRU(4, 32)
    nn.init.zeros_(layer.get_parameter("weight_hh_l0"))
    assert sparsity_report(layer).weights[1].fullest_group == 1


def test_nothing_recurrent():
    report = sparsity_report(nn.Linear(3, 2))
    assert report.weights == ()
    assert report.density != report.density
    assert "No recurrent layer" in str(report)
    assert "weight" in str(report)


def test_shapes_that_are_no_recurrent_layer_are_other_tensors():
    state = {"weight_hh_l0": torch.ones(10, 4), "weight_ih_l0": torch.ones(10, 4), "weight_ih_l1": torch.ones(3)}
    report = sparsity_report(state)
    assert report.weights == ()
    assert len(report.others) == 3


def test_everything_pruned():
    layer = nn.GRU(4, 8)
    for weight in layer.parameters():
        nn.init.zeros_(weight)
    report = sparsity_report(layer)
    assert report.density == 0
    assert report.multiply_accumulates == 0
    assert "0.0%" in str(report)


def test_nan_is_not_zero():
    layer = nn.GRU(4, 8)
    nn.init.constant_(layer.get_parameter("weight_hh_l0"), float("nan"))
    assert sparsity_report(layer).weights[1].density == 1


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"model must be an nn.Module or a state_dict, got list"):
        sparsity_report([1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no tensors"):
        sparsity_report({"epoch": 3})
    with pytest.raises(ValueError, match=r"meta device, such as weight_ih_l0"):
        sparsity_report(nn.GRU(4, 8, device="meta"))
    with pytest.raises(ValueError, match="pattern"):
        sparsity_report(nn.GRU(4, 8), pattern=(0, 1))


def test_bare_state_dict_of_a_converted_model():
    state = to_sparse(pruned(nn.GRU(20, 32)).eval()).state_dict()
    with pytest.raises(ValueError, match=r"parts of a converted layer.* such as weight_ih_l0_values.* save_sparse"):
        sparsity_report(state)


def test_the_model_is_not_changed():
    model = pruned(nn.GRU(20, 32))
    before = copy.deepcopy(model.state_dict())
    report = sparsity_report(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.weights = ()  # type: ignore[misc]


def quantized(tensor: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch will take them away
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


ODD = {
    "quantized": quantized,
    "coo": torch.Tensor.to_sparse,
    "csr": torch.Tensor.to_sparse_csr,
    "bsr": lambda tensor: tensor.to_sparse_bsr((8, 1)),
    "bool": torch.Tensor.bool,
    "int32": lambda tensor: tensor.mul(100).int(),
    "uint16": lambda tensor: tensor.abs().mul(100).to(torch.uint16),
    "float8_e4m3fn": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "float8_e5m2": lambda tensor: tensor.to(torch.float8_e5m2),
    "complex": lambda tensor: tensor.to(torch.complex64).conj(),
    "0-dim": lambda tensor: tensor[0, 0].clone(),
    "3-dim": lambda tensor: tensor[..., None],
    "empty": lambda tensor: tensor[:, :0],
    "of other rows": lambda tensor: tensor[1:],
}
NOT_A_WEIGHT = ("complex", "0-dim", "3-dim", "empty", "of other rows")


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", ["weight_hh_l0", "weight_ih_l0", "weight_hr_l0", "bias_hh_l0", "other"])
def test_tensors_of_every_kind_are_reported(name: str, kind: str):
    layer = nn.LSTM(8, 16, proj_size=8)
    state = layer.state_dict()
    dense = torch.zeros(64, 8) if name == "other" else state[name].detach().clone()
    dense = torch.where(torch.arange(dense.numel()).view(dense.shape) % 4 == 0, 1.0, 0.0)
    if dense.dim() == 1 and kind in ("csr", "bsr", "0-dim", "empty"):
        pytest.skip("not of a vector")
    state[name] = ODD[kind](dense)
    report = sparsity_report(state)
    reported: Any = {tensor.name: tensor for tensor in (*report.weights, *report.others)}
    assert reported.keys() == state.keys()
    assert tuple(reported[name].shape) == tuple(state[name].shape)
    if kind in ("0-dim", "3-dim", "empty", "of other rows"):
        return
    assert reported[name].nonzero == dense.ne(0).sum()
    if name.startswith("weight") and kind not in NOT_A_WEIGHT:
        assert reported[name].dense_bytes == dense.numel() * state[name].element_size()
        assert name in [weight.name for weight in report.weights]


@pytest.mark.parametrize("name", ["weight_hh_l0", "other"])
@pytest.mark.parametrize("dtype", [torch.float4_e2m1fn_x2, torch.bits8], ids=str)
def test_numbers_that_torch_cannot_read_are_named(name: str, dtype: torch.dtype):
    state = nn.GRU(8, 8).state_dict() | {name: torch.zeros(24, 8, dtype=torch.uint8).view(dtype)}
    with pytest.raises(
        ValueError, match=rf"^{name}, {dtype} of layout torch.strided, cannot be read: .* not implemented"
    ):
        sparsity_report(state)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_named(layout: torch.layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are a prototype
        nested = torch.nested.as_nested_tensor([torch.zeros(2, 3), torch.zeros(1, 3)], layout=layout)
    with pytest.raises(ValueError, match="model has nested tensors, which have several shapes, such as weight_hh_l0"):
        sparsity_report({"weight_hh_l0": nested})


def make_head(zeros: float = 0.9) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.GRU(32, 32), nn.Linear(32, 48), nn.Conv1d(48, 16, 1))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.masked_fill_(torch.rand(parameter.shape) < zeros, 0)
    return model


def test_linear_layers_that_are_named_count():
    model: Any = make_head()
    report = sparsity_report(model, include=("1.weight", "2.*"))
    named = [weight for weight in report.weights if not weight.recurrent]
    assert [weight.name for weight in named] == ["1.weight", "2.weight"]
    assert named[0].nonzero == int(model[1].weight.count_nonzero())
    assert named[1].shape == (16, 48)
    fast: Any = to_sparse(model, include=("1.weight", "2.*"))
    assert [weight.stored_bytes for weight in named] == [fast[1].weight.nbytes, fast[2].weight.nbytes]
    assert "Recurrent and linear layers: " in str(report)
    assert sparsity_report(model.state_dict(), include=("1.weight", "2.*")) == report
    assert str(sparsity_report(model[1], include=("weight",))).count("Linear layers: ") == 1


def test_a_linear_layer_that_would_stay_dense_is_reported_so():
    (weight,) = sparsity_report(make_head(zeros=0.0)[1], include=("weight",)).weights
    assert weight.pattern is None
    assert weight.stored_bytes == weight.dense_bytes


def test_converted_linear_layers_count():
    model: Any = make_head()
    fast: Any = to_sparse(model, include=("1.weight",))
    report = sparsity_report(fast)
    (linear,) = (weight for weight in report.weights if not weight.recurrent)
    assert (linear.name, linear.nonzero) == ("1.weight", int(model[1].weight.count_nonzero()))
    assert linear.stored_bytes == fast[1].weight.nbytes
    assert "2.weight" in [tensor.name for tensor in report.others]
    with pytest.raises(ValueError, match="parts of a converted layer's weights without their sizes, such as weight_"):
        sparsity_report(fast[1].state_dict())


def test_globs_that_match_nothing_are_refused():
    with pytest.raises(ValueError, match=r"include has 'fc.weight', which matches no tensor of two dimensions"):
        sparsity_report(make_head(), include=("fc.weight",))
    with pytest.raises(TypeError, match="include must be a sequence of globs"):
        sparsity_report(make_head(), include="1.weight")
