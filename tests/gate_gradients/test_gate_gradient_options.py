"""The arguments of GateGradientSparsity."""

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest

from triton_sparse_rnn import GateGradientSparsity
from triton_sparse_rnn.gate_gradients.contract import Rule
from triton_sparse_rnn.gate_gradients.controller import rule_of


class TestArguments:
    @pytest.mark.parametrize("value", [-0.1, -math.inf, math.inf, math.nan])
    def test_threshold_out_of_range(self, value):
        with pytest.raises(ValueError, match=r"threshold must be a number from 0 that float32 holds, got"):
            GateGradientSparsity(threshold=value)

    @pytest.mark.parametrize("value", [-0.1, 1.0, 1, 80, math.nan])
    def test_target_out_of_range(self, value):
        with pytest.raises(ValueError, match=r"target must be a number in \[0, 1\), got"):
            GateGradientSparsity(target=value)

    @pytest.mark.parametrize("name", ["threshold", "target", "gain", "loss_scale"])
    @pytest.mark.parametrize("value", [True, "0.5", [0.5], 0.5j])
    def test_no_number(self, name, value):
        arguments: Any = {name: value} if name in ("threshold", "target") else {name: value, "target": 0.5}
        with pytest.raises((TypeError, ValueError), match=rf"{name} must be a .*number.*, got"):
            GateGradientSparsity(**arguments)

    def test_both_or_neither(self):
        cases: list[dict[str, Any]] = [{}, {"threshold": 0.1, "target": 0.8}, {"rule": "stochastic"}]
        for arguments in cases:
            with pytest.raises(ValueError, match="give threshold or target, not both, got "):
                GateGradientSparsity(**arguments)

    @pytest.mark.parametrize(
        ("arguments", "kind", "message"),
        [
            ({"rule": "small"}, ValueError, "rule must be one of None, 'deterministic', 'stochastic', got 'small'"),
            ({"rule": 1}, ValueError, "rule must be one of .* got 1"),
            ({"structure": "columns"}, ValueError, "structure must be one of 'elements', 'blocks', got 'columns'"),
            ({"structure": None}, ValueError, "structure must be one of"),
            ({"units": 0}, ValueError, "units must be an integer from 1 to 2147483647, got 0"),
            ({"units": 2.0}, ValueError, "units must be an integer from 1 to 2147483647, got 2.0"),
            ({"rows": -1}, ValueError, "rows must be an integer from 1 to 2147483647, got -1"),
            ({"rows": True}, TypeError, "rows must be an integer from 1 to 2147483647, got True"),
            ({"rows": "16"}, TypeError, "rows must be an integer from 1 to 2147483647, got '16'"),
            ({"begin_step": -1}, ValueError, "begin_step must be an integer from 0, got -1"),
            ({"begin_step": None}, TypeError, "begin_step must be an integer from 0, got None"),
            ({"end_step": 1.5}, ValueError, "end_step must be None or an integer from 0, got 1.5"),
            ({"begin_step": 3, "end_step": 3}, ValueError, "end_step must be above begin_step=3, got 3"),
            ({"dense_every": 1}, ValueError, "dense_every must be None or an integer from 2, got 1"),
            ({"loss_scale": 0.0}, ValueError, "loss_scale must be a finite number above 0, got 0.0"),
            ({"loss_scale": None}, TypeError, "loss_scale must be a finite number above 0, got None"),
            ({"gain": 0}, ValueError, "gain must be a finite number above 0, got 0"),
            ({"seed": -1}, ValueError, r"seed must be an integer from 0 to 2\^32 - 1, got -1"),
            ({"seed": 2**32}, ValueError, r"seed must be an integer from 0 to 2\^32 - 1, got 4294967296"),
            (
                {"backend": "cuda"},
                ValueError,
                "backend must be None or one of 'triton', 'cpu', 'reference', got 'cuda'",
            ),
        ],
        ids=str,
    )
    def test_other_arguments(self, arguments, kind, message):
        with pytest.raises(kind, match=message):
            GateGradientSparsity(target=0.5, **arguments)

    def test_names_only(self):
        positional: Any = GateGradientSparsity
        with pytest.raises(TypeError, match="positional"):
            positional(0.1)

    def test_repr_says_what_was_given(self):
        assert repr(GateGradientSparsity(target=0.8)) == "GateGradientSparsity(target=0.8)"
        given = "GateGradientSparsity(threshold=0.01, structure='blocks', units=8, end_step=9)"
        assert repr(GateGradientSparsity(threshold=0.01, structure="blocks", units=8, rows=16, end_step=9)) == given

    def test_are_plain_values(self):
        options: Any = GateGradientSparsity(target=0.8, rule="stochastic")
        assert options == GateGradientSparsity(target=0.8, rule="stochastic") == pickle.loads(pickle.dumps(options))
        assert options != GateGradientSparsity(target=0.8)
        assert len({options, copy.copy(options), copy.deepcopy(options)}) == 1
        with pytest.raises(AttributeError):
            options.target = 0.5

    def test_step(self):
        options = GateGradientSparsity(target=0.8, begin_step=2, end_step=8, dense_every=3)
        assert [step for step in range(10) if options.is_sparse(step)] == [3, 4, 6, 7]
        assert all(GateGradientSparsity(target=0.8).is_sparse(step) for step in range(3))

    @pytest.mark.parametrize(
        ("arguments", "rule"),
        [
            ({}, Rule("small", "elements")),
            ({"rule": "stochastic"}, Rule("sample", "elements")),
            ({"structure": "blocks", "units": np.int64(3), "rows": 2}, Rule("sample", "blocks", 3, 2)),
            ({"structure": "blocks", "rule": "deterministic"}, Rule("small", "blocks")),
        ],
    )
    def test_rule(self, arguments, rule):
        assert rule_of(GateGradientSparsity(target=0.75, **arguments)) == rule
