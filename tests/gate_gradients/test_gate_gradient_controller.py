"""What a layer with a gate_gradient holds: when it is sparse, by which thresholds, its copies and their states."""

import copy
import gc
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from triton_sparse_rnn import GateGradientSparsity, SparseGRU, SparseLSTM
from triton_sparse_rnn.gate_gradients.contract import Decision
from triton_sparse_rnn.gate_gradients.controller import GateGradientController, _layers_given

T, B, I, H = 5, 3, 4, 7


def step(layer: nn.Module, seed: int = 0, scale: float = 1.0) -> None:
    """One backward through a layer; the input depends on the seed alone."""
    x = torch.randn(T, B, I, generator=torch.Generator().manual_seed(seed))
    layer.zero_grad()
    (layer(x)[0].sin().sum() * scale).backward()


def sparsity(**arguments: Any) -> GateGradientSparsity:
    """One that needs no compiler."""
    return GateGradientSparsity(backend="reference", **arguments)


def gradients(layer: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None]


def lstm(gate_gradient: GateGradientSparsity | None = None, **options: Any) -> SparseLSTM:
    torch.manual_seed(0)
    return SparseLSTM(I, H, gate_gradient=gate_gradient, **options)


def own(layer: SparseLSTM | SparseGRU) -> GateGradientController:
    """The layer's controller, which it has."""
    assert layer.gate_gradient_controller is not None
    return layer.gate_gradient_controller


@pytest.fixture
def decisions(monkeypatch) -> list[Decision]:
    """Every decision that is made in the test."""
    made: list[Decision] = []
    begin = GateGradientController.begin

    def begin_and_note(self, index, direction, arriving):
        made.append(begin(self, index, direction, arriving))
        return made[-1]

    monkeypatch.setattr(GateGradientController, "begin", begin_and_note)
    return made


class TestSteps:
    def test_only_backward_counts(self, decisions):
        layer = lstm(sparsity(threshold=0.1, begin_step=1))
        x = torch.randn(T, B, I)
        layer(x)
        layer.eval()(x)[0].sum().backward()
        layer.train()
        with torch.no_grad():
            layer(x)
        y = layer(x)[0].sum()
        y.backward(retain_graph=True)
        y.backward()
        assert [decision.thresholds is None for decision in decisions] == [True, False]

    def test_first_of_a_target_is_dense(self, decisions):
        layer = lstm(sparsity(target=0.5, begin_step=2))
        for _ in range(5):
            step(layer)
        assert [decision.thresholds is None for decision in decisions] == [True, True, True, False, False]
        assert [decision.keep_gates for decision in decisions] == [False, False, True, False, False]


class TestLossScale:
    def test_number(self, decisions):
        step(lstm(sparsity(threshold=0.25, loss_scale=8)))
        assert decisions[0].thresholds is not None
        assert decisions[0].thresholds.tolist() == [2.0] * 4

    def test_function(self, decisions):
        scales: list[Any] = [4.0, torch.tensor(2.0), torch.tensor([0.5], dtype=torch.float64)]
        waiting = list(scales)
        layer = lstm(sparsity(threshold=0.25, loss_scale=lambda: waiting.pop(0), structure="blocks", units=H, rows=1))
        for _ in scales:
            step(layer)
        assert [decision.thresholds.tolist() for decision in decisions if decision.thresholds is not None] == [
            [1.0],
            [0.5],
            [0.125],
        ]
        assert all(
            decision.thresholds is not None and decision.thresholds.dtype == torch.float32 for decision in decisions
        )

    @pytest.mark.parametrize("scale", [0.0, math.nan, -1.0, math.inf])
    def test_function_gives_no_scale(self, scale, decisions):
        with pytest.raises(ValueError, match=r"loss_scale\(\) must be a finite number above 0"):
            step(lstm(sparsity(threshold=0.25, loss_scale=lambda: scale)))
        step(lstm(sparsity(threshold=0.25, loss_scale=lambda: torch.tensor(scale))))
        assert decisions[0].thresholds is not None
        assert decisions[0].thresholds.tolist() == [0.0] * 4

    def test_function_gives_several(self):
        with pytest.raises(ValueError, match=r"loss_scale\(\) must be one number, got a tensor \[2\]"):
            step(lstm(sparsity(threshold=0.25, loss_scale=lambda: torch.ones(2))))

    def test_scaled_loss_with_its_scale_zeroes_the_same(self):
        counts = []
        for scale in (1.0, 2.0**20):
            layer = lstm(sparsity(threshold=0.05, loss_scale=scale))
            step(layer, scale=scale)
            counts.append(layer.gate_gradient_stats)
        assert counts[0] == counts[1]
        assert 0.05 < counts[0].zeros["l0"]["i"] < 0.95


class TestLayers:
    def test_layers_share_options_and_no_state(self):
        options = sparsity(target=0.5)
        layers = [lstm(options), lstm(options)]
        step(layers[0])
        assert layers[0].gate_gradient is layers[1].gate_gradient is options
        assert own(layers[0]) is not own(layers[1])
        assert layers[0].gate_gradient_stats is not None
        assert layers[1].gate_gradient_stats is None

    def test_layers_draw_different_numbers(self, decisions):
        options = sparsity(threshold=0.5, rule="stochastic")
        layers = [lstm(options, num_layers=2, bidirectional=True) for _ in range(2)]
        layers.append(lstm(copy.deepcopy(layers[0]).gate_gradient, num_layers=2, bidirectional=True))
        for layer in layers:
            step(layer)
            step(layer)
        seeds = [int(decision.seed) for decision in decisions]
        assert len(set(seeds)) == len(seeds) == 24
        assert all(0 <= seed < 2**32 for seed in seeds)

    def test_numbers_depend_on_order_and_seed_alone(self, decisions):
        for seed in (0, 0, 1):
            options = sparsity(threshold=0.5, rule="stochastic", seed=seed)
            for _ in range(2):
                before = torch.get_rng_state()
                layer = lstm(options)
                torch.set_rng_state(before)
                step(layer)
                assert torch.equal(torch.get_rng_state(), before)
        first, second, other = ([int(decision.seed) for decision in decisions[k : k + 2]] for k in (0, 2, 4))
        assert first == second
        assert not set(first) & set(other)

    def test_a_new_start_by_setting_it_again(self):
        layer = lstm(sparsity(target=0.5))
        step(layer)
        layer.gate_gradient = layer.gate_gradient
        assert layer.gate_gradient_stats is None

    def test_units_must_fit(self):
        layer = lstm()
        layer.gate_gradient = sparsity(target=0.5, structure="blocks", units=H)
        before = layer.gate_gradient
        with pytest.raises(ValueError, match=f"units must be at most the layer's hidden_size={H}, got {H + 1}"):
            layer.gate_gradient = sparsity(target=0.5, structure="blocks", units=H + 1)
        assert layer.gate_gradient is before
        layer.gate_gradient = sparsity(target=0.5, units=H + 1)  # not blocks

    @pytest.mark.parametrize("copied", ["deepcopy", "pickle", "save"])
    def test_a_copied_layer_goes_on_alike(self, copied):
        layer = lstm(sparsity(target=0.6, rule="stochastic"))
        for seed in range(3):
            step(layer, seed)
        if copied == "save":
            buffer = io.BytesIO()
            torch.save(layer, buffer)
            buffer.seek(0)
            twin = torch.load(buffer, weights_only=False)
        else:
            twin = copy.deepcopy(layer) if copied == "deepcopy" else pickle.loads(pickle.dumps(layer))
        for seed in range(3, 5):
            step(layer, seed)
        stats = layer.gate_gradient_stats
        for seed in range(3, 5):
            step(twin, seed)
        assert twin.gate_gradient_stats == stats
        assert layer.gate_gradient_stats == stats
        assert all(map(torch.equal, gradients(layer), gradients(twin)))

    def test_a_deep_copy_shares_the_function_of_the_scale(self):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        twin = copy.deepcopy(lstm(sparsity(threshold=0.1, loss_scale=scaler.get_scale)))
        assert own(twin).options.loss_scale.__self__ is scaler  # type: ignore[union-attr]

    def test_options_that_are_gone_are_forgotten(self):
        kept = len(_layers_given)
        lstm(sparsity(threshold=0.1))
        gc.collect()
        assert len(_layers_given) == kept


class TestState:
    @pytest.mark.parametrize("arguments", [{}, {"rule": "stochastic"}, {"structure": "blocks", "units": 2, "rows": 2}])
    def test_exact_resume(self, arguments):
        options = sparsity(target=0.7, dense_every=3, **arguments)
        whole, resumed = lstm(options, num_layers=2, bidirectional=True), None
        for seed in range(4):
            step(whole, seed)
        buffer = io.BytesIO()
        torch.save(own(whole).state_dict(), buffer)
        expected = []
        for seed in range(4, 10):
            step(whole, seed)
            expected.append(gradients(whole))
        buffer.seek(0)
        lstm(options)
        resumed = lstm(options, num_layers=2, bidirectional=True)  # the third layer with these options
        own(resumed).load_state_dict(torch.load(buffer, weights_only=True))
        for seed, parts in zip(range(4, 10), expected, strict=True):
            step(resumed, seed)
            assert all(map(torch.equal, gradients(resumed), parts))
        assert resumed.gate_gradient_stats == whole.gate_gradient_stats
        assert_states_equal(own(resumed).state_dict(), own(whole).state_dict())

    def test_a_fixed_threshold_resumes_what_it_expects(self, decisions):
        layer, resumed = (lstm(sparsity(threshold=0.1)) for _ in range(2))
        step(layer)
        own(resumed).load_state_dict(own(layer).state_dict())
        decisions.clear()
        step(layer)
        step(resumed)
        assert decisions[0].likely_zeros == decisions[1].likely_zeros > 0

    def test_a_state_is_a_copy(self):
        layer = lstm(sparsity(target=0.7))
        step(layer)
        saved = own(layer).state_dict()
        kept = copy.deepcopy(saved)
        for _ in range(2):
            step(layer)
        assert_states_equal(saved, kept)
        own(layer).load_state_dict(saved)
        step(layer)
        assert_states_equal(saved, kept)

    def test_other_arguments_may_go_on(self, decisions):
        layer = lstm(sparsity(target=0.7))
        step(layer)
        state = own(layer).state_dict()
        layer.gate_gradient = sparsity(target=0.9, rule="stochastic", gain=1.0)
        own(layer).load_state_dict(state)
        step(layer)
        assert decisions[1].thresholds is not None  # is not dense again

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (lambda options: lstm(options, num_layers=2), r"of a layer with .*\['l0'\].*, but this layer has .*'l1'"),
            (lambda options: lstm(options, bidirectional=True), r"but this layer has .*'l0_reverse'"),
            (lambda options: SparseGRU(I, H, gate_gradient=options), r"'gates': 'ifgo'.* has .*'gates': 'rzn'"),
            (lambda options: SparseLSTM(I, H + 1, gate_gradient=options), r"'hidden_size': 7.* 'hidden_size': 8"),
        ],
    )
    def test_of_another_layer(self, other, message):
        options = sparsity(target=0.7)
        with pytest.raises(ValueError, match=message):
            own(other(options)).load_state_dict(own(lstm(options)).state_dict())

    def test_of_another_structure(self):
        state = own(lstm(sparsity(target=0.7, structure="blocks", units=H, rows=1))).state_dict()
        with pytest.raises(
            ValueError, match=r"\['log_thresholds'\] must be torch.float32 \[1, 4\], got .* \[1, 1\]; .*structure"
        ):
            own(lstm(sparsity(target=0.7))).load_state_dict(state)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"version": 2}, "state_dict has version 2, this package reads 1"),
            ({"stream": -1}, r"\['stream'\] must be an integer from 0, got -1"),
            ({"stream": True}, r"\['stream'\] must be an integer from 0, got True"),
            ({"steps": [1]}, r"\['steps'\] must be torch.int64 \[1\], got a list"),
            ({"steps": torch.tensor([-1])}, r"\['steps'\] is damaged"),
            ({"steps": torch.tensor([1.0])}, r"\['steps'\] must be torch.int64 \[1\], got torch.float32"),
            ({"log_thresholds": torch.full((1, 4), torch.nan)}, r"\['log_thresholds'\] is damaged"),
            ({"total": torch.zeros(1, 3, dtype=torch.int64)}, r"\['total'\] must be torch.float64 \[1, 7\]"),
            ({"calibrated": [1]}, r"\['calibrated'\] must be a list of 1 bools, got \[1\]"),
            ({"calibrated": []}, r"\['calibrated'\] must be a list of 1 bools"),
            ({"likely_zeros": [1.5]}, r"\['likely_zeros'\] must be a list of 1 floats from 0 to 1, got \[1.5\]"),
            ({"mask": 1}, "not of a gate_gradient: missing none; unexpected mask"),
        ],
        ids=str,
    )
    def test_damaged(self, change, message):
        layer = lstm(sparsity(target=0.7))
        step(layer)
        state = own(layer).state_dict()
        with pytest.raises(ValueError, match=message):
            own(layer).load_state_dict({**state, **change})
        assert_states_equal(own(layer).state_dict(), state)

    def test_incomplete_or_no_state(self):
        controller = own(lstm(sparsity(target=0.7)))
        state = controller.state_dict()
        del state["steps"]
        with pytest.raises(ValueError, match="missing steps; unexpected none"):
            controller.load_state_dict(state)
        no_state: Any = [1]
        with pytest.raises(TypeError, match="state_dict must be a mapping, got list"):
            controller.load_state_dict(no_state)


def assert_states_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert list(one) == list(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name], name
