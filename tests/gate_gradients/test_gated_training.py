"""A layer with a gate_gradient against torch.nn's: the same results and, with nothing zeroed, gradients."""

import copy
import inspect

import pytest
import torch
from gated_cases import (
    FORMS,
    LAYERS,
    NOTHING,
    OPTIONS,
    PACKED_FORMS,
    cells,
    has_other_operands,
    make_pair,
    random_state,
    rounding_of,
    run,
)
from layer_pairs import B, H, I, T, assert_same, error, identify, tensors_of
from processor import skip_where_torch_cannot_autocast
from torch.func import functional_call

from triton_sparse_rnn import GateGradientSparsity

# Every form of a call with every options of some cell, and with every cell of some options.
CALLS = [
    (*layer, form)
    for number, layer in enumerate(LAYERS)
    for form in [*FORMS, *PACKED_FORMS][(number + number // len(OPTIONS)) % 2 :: 2]
]
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # says torch's own


class TestAgainstTorch:
    @pytest.mark.parametrize(("dense_class", "sparse_class", "options", "form"), CALLS, ids=identify)
    def test_results_and_gradients(self, dense_class, sparse_class, options, form):
        dense, sparse = make_pair(dense_class, sparse_class, options)
        sparse.gate_gradient = GateGradientSparsity(threshold=0.0)  # on the backend that a user gets
        dtype = dense.weight_ih_l0.dtype
        exact = copy.deepcopy(dense).double()
        exact_mask_differs = options.get("dropout") and dtype != torch.float64
        theirs, their_gradients = run(dense, form, dtype)
        ours, our_gradients = run(sparse, form, dtype)
        rounding = rounding_of(dense, dtype)
        assert_same(ours, theirs, rounding if has_other_operands(dense, form) else 0)
        assert sparse.gate_gradient_stats.steps == 1
        if exact_mask_differs:  # random numbers in float64 are others
            for one, other in zip(our_gradients, their_gradients, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
            return
        _, exact_gradients = run(exact, form, torch.float64)
        pairs = zip(error(our_gradients, exact_gradients), error(their_gradients, exact_gradients), strict=True)
        assert all(our_error <= 2 * their_error + rounding for our_error, their_error in pairs)
        for one, other in zip(our_gradients, their_gradients, strict=True):
            assert (one.dtype, one.shape) == (other.dtype, other.shape)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16], ids=str)
    @cells
    def test_autocast(self, dense_class, sparse_class, dtype, state_dtype):
        skip_where_torch_cannot_autocast(dense_class)
        pair = make_pair(dense_class, sparse_class, {"num_layers": 2, "bidirectional": True, "dropout": 0.3})
        x, state = torch.randn(T, B, I, dtype=dtype), None
        if state_dtype is not None:
            states = [one.to(state_dtype) for one in tensors_of(random_state(pair[0], (B,)))]
            state = tuple(states) if len(states) == 2 else states[0]
        results = []
        for layer in pair:
            torch.manual_seed(4)
            with torch.autocast("cpu", torch.bfloat16):
                results.append(layer(x, state))
            results[-1][0].float().square().sum().backward()
        assert_same(results[1], results[0])
        gradients = [[parameter.grad for parameter in layer.parameters()] for layer in pair]
        assert all(gradient.dtype == torch.float32 for gradient in gradients[1])
        assert max(error(gradients[1], gradients[0])) < 0.03  # a few roundings to bfloat16

    @cells
    def test_strided_weights_by_functional_call(self, dense_class, sparse_class):
        dense, sparse = make_pair(dense_class, sparse_class)
        weights = {name: torch.randn(*reversed(value.shape)).t() for name, value in dense.state_dict().items()}
        weights = {
            name: torch.randn(2 * len(value))[::2] if value.dim() == 1 else weights[name]
            for name, value in dense.state_dict().items()
        }
        x, gradients = torch.randn(T, B, I), []
        for layer in (dense, sparse):
            given = {name: value.detach().requires_grad_() for name, value in weights.items()}
            y = functional_call(layer, given, (x,))[0]
            gradients.append([y, *torch.autograd.grad(y.sin().sum(), list(given.values()))])
        assert sparse.gate_gradient_stats.steps == 1
        assert torch.equal(gradients[1][0], gradients[0][0])
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class TestWhenItIsTorchs:
    def calls_without_a_gradient(self):
        def without_grad(layer, x):
            with torch.no_grad():
                return layer(x)

        def in_inference_mode(layer, x):
            with torch.inference_mode():
                return layer(x)

        def nothing_to_learn(layer, x):
            return layer.requires_grad_(False)(x)

        return [lambda layer, x: layer.eval()(x), without_grad, in_inference_mode, nothing_to_learn]

    @cells
    def test_same_results(self, dense_class, sparse_class, monkeypatch):
        monkeypatch.setattr("triton_sparse_rnn.gate_gradients.layer.run_layer", lambda *_: pytest.fail("ours ran"))
        for call in self.calls_without_a_gradient():
            pair = make_pair(dense_class, sparse_class, {"num_layers": 2, "dropout": 0.5})
            x, results = torch.randn(T, B, I), []
            for layer in pair:
                torch.manual_seed(4)
                results.append(call(layer, x))
            assert_same(results[1], results[0])
            assert pair[1].gate_gradient_stats is None

    @cells
    def test_what_alone_needs_a_gradient_counts(self, dense_class, sparse_class):
        layer = make_pair(dense_class, sparse_class)[1].requires_grad_(False)
        for form in ("x", "state", "weight"):
            layer.gate_gradient = NOTHING
            x, h = torch.randn(T, B, I, requires_grad=form == "x"), random_state(layer, (B,))
            tensors_of(h)[-1].requires_grad_(form == "state")
            if form == "weight":
                del layer.weight_hh_l0
                layer.weight_hh_l0 = torch.randn(layer.bias_hh_l0.numel(), H, requires_grad=True)
            layer(x, h)[0].sum().backward()
            assert layer.gate_gradient_stats.steps == 1

    @cells
    def test_eval_with_gradients_is_torchs(self, dense_class, sparse_class):
        dense, sparse = (layer.eval() for layer in make_pair(dense_class, sparse_class, {"dtype": torch.float64}))
        x = torch.randn(2, 2, I, dtype=torch.float64, requires_grad=True)
        assert_same(sparse(x), dense(x))
        assert torch.autograd.gradgradcheck(lambda x: sparse(x)[0], x)

    @cells
    def test_no_rows_and_meta(self, dense_class, sparse_class):
        dense, sparse = make_pair(dense_class, sparse_class)
        assert_same(sparse(torch.zeros(T, 0, I)), dense(torch.zeros(T, 0, I)))
        with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
            sparse(torch.zeros(0, B, I))
        meta = sparse_class(I, H, gate_gradient=NOTHING, device="meta")
        assert meta(torch.zeros(T, B, I, device="meta"))[0].shape == (T, B, H)

    @cells
    def test_signature(self, dense_class, sparse_class):
        assert inspect.signature(sparse_class.forward) == inspect.signature(dense_class.forward)
