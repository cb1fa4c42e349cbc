"""A layer with a gate_gradient among the tools of torch, as a module, and made by sparsify."""

import copy
import warnings
from typing import Any

import pytest
import torch
from gated_cases import NOTHING, cells, make_pair, rounding_of
from layer_pairs import B, H, I, T, error
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from triton_sparse_rnn import BackendUnavailableError, GateGradientSparsity, SparseGRU, SparseLSTM, SparseRNN, sparsify


class TestTools:
    @cells
    def test_parametrized_weight(self, dense_class, sparse_class):
        class Half(nn.Module):
            def forward(self, weight):
                return weight / 2

        pair, results = make_pair(dense_class, sparse_class), []
        for layer in pair:
            parametrize.register_parametrization(layer, "weight_hh_l0", Half())
            torch.manual_seed(3)
            results.append(layer(torch.randn(T, B, I))[0])
            results[-1].sin().sum().backward()
        assert torch.equal(results[1], results[0])
        gradients = [layer.parametrizations.weight_hh_l0.original.grad for layer in pair]
        assert error(gradients[1:], gradients[:1])[0] <= rounding_of(pair[0], torch.float32)
        assert pair[1].gate_gradient_stats.steps == 1
        parametrize.remove_parametrizations(pair[1], "weight_hh_l0")
        assert pair[1].gate_gradient_stats.steps == 1

    @cells
    def test_weight_norm(self, dense_class, sparse_class):
        pair = make_pair(dense_class, sparse_class)
        for layer in pair:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # deprecated, and in use
                nn.utils.weight_norm(layer, "weight_hh_l0")
            torch.manual_seed(3)
            layer(torch.randn(T, B, I))[0].sin().sum().backward()
        gradients = [layer.weight_hh_l0_g.grad for layer in pair]
        assert error(gradients[1:], gradients[:1])[0] <= rounding_of(pair[0], torch.float32)

    @cells
    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpoint(self, dense_class, sparse_class, use_reentrant):
        options = {"num_layers": 2, "dropout": 0.5}
        plain, stored = (make_pair(dense_class, sparse_class, options)[1] for _ in range(2))
        x, gradients = torch.randn(T, B, I, requires_grad=True), []
        for layer in (plain, stored):
            layer.gate_gradient = GateGradientSparsity(target=0.5, rule="stochastic", backend="reference")
            for seed in range(3):
                torch.manual_seed(seed)
                if layer is plain:
                    y: Any = layer(x)[0]
                else:
                    y = checkpoint(lambda x: stored(x)[0], x, use_reentrant=use_reentrant)
                layer.zero_grad()
                y.sin().sum().backward()
            gradients.append([parameter.grad for parameter in layer.parameters()])
        assert all(map(torch.equal, *gradients))
        assert plain.gate_gradient_stats == stored.gate_gradient_stats
        assert stored.gate_gradient_stats.steps == 3

    @cells
    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    @pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
    def test_compile(self, dense_class, sparse_class, backend):
        class Model(nn.Module):
            def __init__(self, layer):
                super().__init__()
                self.layer = layer

            def forward(self, x):
                return self.layer(x * 2)[0].sin() + 1

        gradients = []
        for compiled in (False, True):
            torch._dynamo.reset()
            layer = make_pair(dense_class, sparse_class, {"num_layers": 2})[1]
            layer.gate_gradient = GateGradientSparsity(target=0.5, backend="reference")
            model: Any = Model(layer)
            model = torch.compile(model, backend=backend) if compiled else model
            results = []
            for seed in range(3):
                torch.manual_seed(seed)
                layer.zero_grad()
                results.append(model(torch.randn(T, B, I)))
                results[-1].square().sum().backward()
            gradients.append([*results, *(parameter.grad for parameter in layer.parameters())])
            assert layer.gate_gradient_stats.steps == 3
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)

    @cells
    def test_hooks(self, dense_class, sparse_class):
        layer, calls = make_pair(dense_class, sparse_class)[1], []
        layer.register_forward_hook(lambda module, args, result: calls.append("after"))
        layer.register_full_backward_hook(lambda module, grad_input, grad_output: calls.append("backward"))
        layer(torch.randn(T, B, I, requires_grad=True))[0].sum().backward()
        assert calls == ["after", "backward"]

    def test_replicas_are_refused(self):
        layer = make_pair(nn.LSTM, SparseLSTM)[1]
        replica: Any = layer._replicate_for_data_parallel()
        with pytest.raises(RuntimeError, match=r"replicas of nn.DataParallel cannot share .* DistributedDataParallel"):
            replica(torch.randn(T, B, I, requires_grad=True))


class TestLayer:
    @cells
    def test_set_and_taken_away(self, dense_class, sparse_class):
        layer = sparse_class(I, H)
        held = list(vars(layer))
        assert layer.gate_gradient is layer.gate_gradient_stats is None
        assert repr(layer) == f"{sparse_class.__name__}({I}, {H})"
        layer.gate_gradient = GateGradientSparsity(target=0.5, rows=8)
        assert repr(layer) == (
            f"{sparse_class.__name__}({I}, {H}, gate_gradient=GateGradientSparsity(target=0.5, rows=8))"
        )
        layer.gate_gradient = None
        assert list(vars(layer)) == held
        assert repr(layer) == f"{sparse_class.__name__}({I}, {H})"

    @cells
    @pytest.mark.parametrize("wrong", [0.8, "0.8", GateGradientSparsity, {"target": 0.8}])
    def test_wrong_type(self, dense_class, sparse_class, wrong):
        for action in (
            lambda: sparse_class(I, H, gate_gradient=wrong),
            lambda: setattr(sparse_class(I, H), "gate_gradient", wrong),
            lambda: sparsify(dense_class(I, H), gate_gradient=wrong),
        ):
            with pytest.raises(TypeError, match="gate_gradient must be a GateGradientSparsity or None, got "):
                action()

    @cells
    def test_state_dict_stays_torchs(self, dense_class, sparse_class):
        dense, sparse = make_pair(dense_class, sparse_class, {"num_layers": 2})
        sparse(torch.randn(T, B, I))[0].sum().backward()
        assert list(sparse.state_dict()) == list(dense.state_dict())
        dense.load_state_dict(sparse.state_dict(), strict=True)
        sparse.load_state_dict(dense.state_dict(), strict=True)
        assert len(list(sparse.buffers())) == 0
        assert sparse.gate_gradient_stats.steps == 1

    @cells
    def test_change_of_dtype_leaves_the_state(self, dense_class, sparse_class):
        layer = sparse_class(I, H, gate_gradient=GateGradientSparsity(target=0.5, backend="reference"))
        layer(torch.randn(T, B, I))[0].sum().backward()
        before = layer.gate_gradient_controller.state_dict()["log_thresholds"]
        layer.double()
        assert torch.equal(layer.gate_gradient_controller.state_dict()["log_thresholds"], before)
        layer(torch.randn(T, B, I).double())[0].sum().backward()
        assert layer.gate_gradient_controller.state_dict()["log_thresholds"].dtype == torch.float32

    def test_from_dense_and_to_sparse_have_none(self):
        layer = SparseLSTM(I, H, gate_gradient=NOTHING)
        assert SparseLSTM.from_dense(layer).gate_gradient is None
        layer.load_state_dict({name: torch.zeros_like(value) for name, value in layer.state_dict().items()})
        assert not hasattr(layer.to_sparse(backend="reference"), "gate_gradient")

    @pytest.mark.parametrize(
        ("backend", "dtype", "message"),
        [
            ("cpu", torch.float64, "backend 'cpu' cannot run"),
            ("triton", torch.float64, "backend 'triton' cannot run"),
            ("cpu", torch.bfloat16, "backend 'cpu' cannot run"),
        ],
        ids=str,
    )
    def test_a_named_backend_raises_in_forward(self, backend, dtype, message):
        layer = SparseLSTM(I, H, dtype=dtype, gate_gradient=GateGradientSparsity(target=0.5, backend=backend))
        with pytest.raises(BackendUnavailableError, match=message):
            layer(torch.randn(T, B, I, dtype=dtype))
        assert layer.eval()(torch.randn(T, B, I, dtype=dtype))[0].dtype == dtype


class TestSparsify:
    def test_every_layer_gets_its_own(self):
        options = GateGradientSparsity(target=0.5, backend="reference")
        model: Any = nn.ModuleList([nn.LSTM(I, H), nn.RNN(I, H), nn.GRU(I, H), SparseLSTM(I, H)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = copy.deepcopy(model[0].weight_hh_l0)
        assert sparsify(model, gate_gradient=options) is model
        assert [type(layer) for layer in model] == [SparseLSTM, SparseRNN, SparseGRU, SparseLSTM]
        gated = [layer for layer in model if not isinstance(layer, SparseRNN)]
        assert all(layer.gate_gradient is options for layer in gated)
        assert len({id(layer.gate_gradient_controller) for layer in gated}) == 3
        for layer in model:
            layer(torch.randn(T, B, I))[0].sum().backward()
        optimizer.step()
        assert not torch.equal(model[0].weight_hh_l0, before)
        assert model[2].gate_gradient_stats.steps == 1

    def test_filter_and_none(self):
        model: Any = nn.ModuleList([nn.LSTM(I, H), nn.LSTM(I, H)])
        sparsify(model, lambda layer, name: name == "1", gate_gradient=NOTHING)
        assert [type(layer) for layer in model] == [nn.LSTM, SparseLSTM]
        kept = model[1].gate_gradient_controller
        sparsify(model)
        assert model[0].gate_gradient is None
        assert model[1].gate_gradient_controller is kept

    def test_what_does_not_fit_changes_nothing(self):
        model: Any = nn.ModuleList([nn.LSTM(I, 9), nn.LSTM(I, H)])
        with pytest.raises(ValueError, match=f"units must be at most the layer's hidden_size={H}, got 8"):
            sparsify(model, gate_gradient=GateGradientSparsity(target=0.5, structure="blocks", units=8))
        assert [type(layer) for layer in model] == [nn.LSTM, nn.LSTM]
        with pytest.raises(ValueError, match=r"gate_gradient needs an nn.GRU or nn.LSTM among the layers taken"):
            sparsify(nn.RNN(I, H), gate_gradient=NOTHING)
