"""Where thresholds start, the size they are a multiple of, and the formula of what zeros are worth."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from triton_sparse_rnn import GateGradientSparsity, SparseGRU, SparseLSTM
from triton_sparse_rnn.gate_gradients.backends.reference import apply_rule, group_sizes
from triton_sparse_rnn.gate_gradients.contract import Arriving, Rule, Steps
from triton_sparse_rnn.gate_gradients.controller import GateGradientController
from triton_sparse_rnn.gate_gradients.thresholds import (
    HIGHEST,
    LOWEST,
    arriving_scale,
    fitting_log_thresholds,
)

STEPS = Steps((7, 7, 4, 1), reverse=False)
N, G, H = 19, 4, 11


def random_gates(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1.0, 1.0, 6.0, 0.5])[:, None]  # gates differ
    return (torch.randn(N, G, H, generator=generator).pow(3) * sizes * 1e-3).to(dtype)


def arriving(scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Arriving:
    torch.manual_seed(0)
    return Arriving(*((torch.randn(rows, H) * scale).to(dtype) for rows in (N, 7, 7)))


class TestScale:
    def test_formula(self):
        y, h, c = arriving()
        assert c is not None
        expected = (sum(float(part.double().square().sum()) for part in (y, h, c)) / (N * H)) ** 0.5
        assert float(arriving_scale(Arriving(y, h, c))) == pytest.approx(expected, rel=1e-6)
        assert float(arriving_scale(Arriving(y, h, None))) < expected

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_dtypes(self, dtype):
        scale = arriving_scale(arriving(256.0, dtype))
        assert (scale.dtype, scale.shape) == (torch.float32, ())
        assert float(scale) == pytest.approx(256 * float(arriving_scale(arriving())), rel=1e-2)

    @pytest.mark.parametrize("power", [-20, 3, 16])
    def test_powers_of_two_are_exact(self, power):
        assert float(arriving_scale(arriving(2.0**power))) == 2.0**power * float(arriving_scale(arriving()))

    def test_not_finite(self):
        for wrong in (torch.inf, -torch.inf, torch.nan):
            parts = arriving()
            parts.h[3, 2] = wrong
            assert not arriving_scale(parts).isfinite()
        empty = torch.zeros(0, H)
        assert float(arriving_scale(Arriving(empty, empty, None))) == 0


class TestStart:
    @pytest.mark.parametrize("target", [0.0, 0.3, 0.8, 0.95])
    @pytest.mark.parametrize("scale", [1.0, 2.0**-12])
    def test_share_of_elements_is_the_target_in_every_gate(self, target, scale):
        gates = random_gates() * scale
        arrived = torch.tensor(scale)
        thresholds = fitting_log_thresholds(gates, STEPS, Rule(), arrived, target).exp() * arrived
        shares = (gates.abs() < thresholds[:, None]).float().mean((0, 2))
        assert thresholds.shape == (G,)
        assert all(abs(float(share) - target) <= 1 / (N * H) + 1e-6 for share in shares)

    @pytest.mark.parametrize("group", ["elements", "blocks"])
    def test_expected_share_when_sampled(self, group):
        gates, scale, rule = random_gates(), torch.tensor(0.01), Rule("sample", group, units=3, rows=2)
        thresholds = fitting_log_thresholds(gates, STEPS, rule, scale, 0.7).exp() * scale
        shares = []
        for seed in range(60):
            parts = [
                apply_rule(gates[first : first + size], first, rule, thresholds, torch.tensor([seed * 7919]))
                for first, size in zip(STEPS.starts, STEPS.batch_sizes, strict=True)
            ]
            shares.append((torch.cat(parts) == 0).float().mean((0, 2)))
        average = torch.stack(shares).mean(0)
        assert len(thresholds) == (G if group == "elements" else 1)
        assert float((average - 0.7).abs().max()) < 0.06  # of few groups, whose last ones are smaller

    @pytest.mark.parametrize(("units", "rows"), [(3, 2), (H, 1)])
    def test_blocks_below_a_threshold(self, units, rows):
        gates, scale, rule = random_gates(), torch.tensor(1.0), Rule("small", "blocks", units, rows)
        threshold = fitting_log_thresholds(gates, STEPS, rule, scale, 0.5).exp()
        sizes = group_sizes(gates, STEPS, rule)
        assert abs(float((sizes < threshold).float().mean()) - 0.5) <= 1 / sizes.numel() + 1e-6

    def test_what_is_not_finite_counts_as_large(self):
        gates = random_gates()
        gates[:, 1, :5] = torch.nan
        gates[:, 2, :5] = -torch.inf
        threshold = fitting_log_thresholds(gates, STEPS, Rule(), torch.tensor(1.0), 0.5).exp()
        shares = (gates.abs() < threshold[:, None]).float().mean((0, 2))
        assert all(abs(float(share) - 0.5) < 0.01 for share in shares)
        sampled = fitting_log_thresholds(gates, STEPS, Rule("sample"), torch.tensor(1.0), 0.5)
        assert sampled.isfinite().all()
        beyond = fitting_log_thresholds(gates, STEPS, Rule(), torch.tensor(1.0), 0.9)
        assert float(beyond[1]) == pytest.approx(HIGHEST, abs=1e-5)

    def test_zeros_by_nature_are_enough(self):
        start = fitting_log_thresholds(torch.zeros(N, G, H), STEPS, Rule(), torch.tensor(1.0), 0.5)
        assert start.tolist() == pytest.approx([LOWEST] * G, abs=1e-5)

    def test_a_part_of_many_is_like_all(self, monkeypatch):
        gates = random_gates().repeat(1, 1, 40)
        gates = gates * torch.rand(gates.shape, generator=torch.Generator().manual_seed(1))
        whole = fitting_log_thresholds(gates, STEPS, Rule(), torch.tensor(1.0), 0.6)
        monkeypatch.setattr("triton_sparse_rnn.gate_gradients.thresholds._ENOUGH", N * 40 * H // 4)
        part = fitting_log_thresholds(gates, STEPS, Rule(), torch.tensor(1.0), 0.6)
        assert not torch.equal(part, whole)
        assert torch.allclose(part, whole, atol=1.0)


def redundant_and_all(layer: Any, gates: list[Tensor], rows: int, learns: dict[str, bool], x_learns: bool) -> tuple:
    """Count the scalar multiplications of a training step one by one: those with a zero gate gradient, and all."""
    redundant = total = 0
    D = 2 if layer.bidirectional else 1
    for k, (layer_index, d) in enumerate(itertools.product(range(layer.num_layers), range(D))):
        suffix = f"l{layer_index}{'_reverse' if d else ''}"
        I_of_layer = getattr(layer, f"weight_ih_{suffix}").shape[1]
        R = getattr(layer, f"weight_hh_{suffix}").shape[1]
        for gate_gradient in gates[k].flatten().tolist():  # of each row, gate and unit
            for _ in range(I_of_layer):
                total += 1  # forward: a weight times an x
                for needed in (learns[f"weight_ih_{suffix}"], layer_index > 0 or x_learns):
                    total += needed
                    redundant += needed and gate_gradient == 0
            for _ in range(R):
                total += 1  # forward: a weight times an h
                for needed in (learns[f"weight_hh_{suffix}"], True):
                    total += needed
                    redundant += needed and gate_gradient == 0
        if layer.proj_size:
            for _ in range(rows * R * layer.hidden_size):
                total += 2 + learns[f"weight_hr_{suffix}"]  # forward, of o tanh(c), of the weight
    return redundant, total


CASES: list[tuple[Any, dict[str, Any], list[str], bool]] = [
    (SparseLSTM, {}, [], False),
    (SparseLSTM, {}, [], True),
    (
        SparseLSTM,
        {"num_layers": 2, "bidirectional": True, "bias": False},
        ["weight_hh_l0", "weight_ih_l1_reverse"],
        False,
    ),
    (SparseLSTM, {"proj_size": 2}, [], True),
    (SparseLSTM, {"proj_size": 2, "num_layers": 2}, ["weight_hr_l0"], False),
    (SparseGRU, {"bidirectional": True}, [], True),
    (SparseGRU, {"num_layers": 2}, ["weight_ih_l0"], False),
]


@pytest.mark.parametrize(("layer_class", "options", "frozen", "x_learns"), CASES)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # says torch's own
def test_redundant_work_counted_one_by_one(layer_class, options, frozen, x_learns, monkeypatch):
    torch.manual_seed(0)
    layer = layer_class(3, 5, **options, gate_gradient=GateGradientSparsity(threshold=0.05, backend="reference"))
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
    seen: dict[int, Tensor] = {}
    begin, finish = GateGradientController.begin, GateGradientController.finish
    monkeypatch.setattr(GateGradientController, "begin", lambda *args: begin(*args)._replace(keep_gates=True))

    def note_gates(self, index, direction, needed, decision, gradients):
        seen[index] = gradients.gates
        finish(self, index, direction, needed, decision._replace(keep_gates=False), gradients)

    monkeypatch.setattr(GateGradientController, "finish", note_gates)
    lengths, shares, stats = (4, 3, 1), [], None
    for _ in range(2):
        rows = [torch.randn(length, 3, requires_grad=x_learns) for length in lengths]
        layer(nn.utils.rnn.pack_sequence(rows))[0].data.sin().sum().backward()
        gates = [seen[index] for index in sorted(seen)]
        learns = {name: parameter.requires_grad for name, parameter in layer.named_parameters()}
        shares.append(redundant_and_all(layer, gates, sum(lengths), learns, x_learns))
        stats = layer.gate_gradient_stats
        assert stats.redundant_macs == shares[-1][0] / shares[-1][1]
        assert 0.05 < stats.redundant_macs < 0.65
        for one, zeros in zip(gates, stats.zeros.values(), strict=True):
            assert list(zeros.values()) == pytest.approx((one == 0).float().mean((0, 2)).tolist())
    assert stats is not None
    redundant, total = map(sum, zip(*shares, strict=True))
    assert stats.mean_redundant_macs == redundant / total
    assert (
        list(stats.zeros)
        == list(stats.mean_zeros)
        == [
            f"l{k}{end}"
            for k in range(layer.num_layers)
            for end in (("", "_reverse") if layer.bidirectional else ("",))
        ]
    )
    assert list(stats.zeros["l0"]) == (["i", "f", "g", "o"] if layer_class is SparseLSTM else ["r", "z", "n"])


def test_two_thirds_of_the_zeros_where_all_is_asked_for():
    layer = SparseLSTM(6, 6, gate_gradient=GateGradientSparsity(threshold=0.05, backend="reference"))
    layer(torch.randn(4, 3, 6, requires_grad=True))[0].sin().mean().backward()
    stats = layer.gate_gradient_stats
    assert stats is not None
    assert stats.redundant_macs == pytest.approx(2 / 3 * sum(stats.zeros["l0"].values()) / 4)


def test_a_direction_without_a_backward_is_left_out(monkeypatch):
    layer = SparseLSTM(3, 5, num_layers=2, gate_gradient=GateGradientSparsity(threshold=0.0, backend="reference"))
    begin = GateGradientController.begin

    def stop_at_lower_layer(self, index, direction, arriving):
        assert index == 1, "stopped"
        return begin(self, index, direction, arriving)

    monkeypatch.setattr(GateGradientController, "begin", stop_at_lower_layer)
    with pytest.raises(AssertionError, match="stopped"):
        layer(torch.randn(4, 2, 3))[0].sum().backward()
    assert layer.gate_gradient_stats is not None
    assert list(layer.gate_gradient_stats.zeros) == ["l1"]
