from typing import Any

import pytest
import torch

from triton_sparse_rnn.errors import BackendUnavailableError
from triton_sparse_rnn.gate_gradients.backends import cpu, reference
from triton_sparse_rnn.gate_gradients.contract import BackwardDirection, Rule, Steps
from triton_sparse_rnn.gate_gradients.dispatch import choose_backward

I, H = 5, 7


def make_direction(mode: Any, *, dtype: torch.dtype = torch.float32, proj_size: int = 0) -> BackwardDirection:
    """A direction of two steps."""
    B, G, R = 3, 4 if mode == "LSTM" else 3, proj_size or H
    return BackwardDirection(
        mode=mode,
        steps=Steps((B, B), reverse=False),
        x=torch.zeros(2 * B, I, dtype=dtype),
        y=torch.zeros(2 * B, R, dtype=dtype),
        h0=torch.zeros(B, R, dtype=dtype),
        c0=torch.zeros(B, H, dtype=dtype) if mode == "LSTM" else None,
        weight_ih=torch.zeros(G * H, I, dtype=dtype),
        weight_hh=torch.zeros(G * H, R, dtype=dtype),
        bias_ih=None,
        bias_hh=None,
        weight_hr=torch.zeros(proj_size, H, dtype=dtype) if proj_size else None,
        workspace=None,
    )


def test_the_fastest_backend_that_can_is_taken():
    assert choose_backward(None, make_direction("LSTM"), Rule()) is cpu
    for direction in [
        make_direction("GRU"),
        make_direction("LSTM", dtype=torch.float64),
        make_direction("LSTM", proj_size=3),
    ]:
        assert choose_backward(None, direction, Rule()) is reference
    assert choose_backward("reference", make_direction("LSTM"), Rule()) is reference


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_named_backend_runs_or_raises(backend):
    with pytest.raises(BackendUnavailableError, match=f"'{backend}' cannot run the backward of this layer: .*float64"):
        choose_backward(backend, make_direction("LSTM", dtype=torch.float64), Rule())
    with pytest.raises(BackendUnavailableError, match=r"GRU.*backend=None takes the fastest one that can"):
        choose_backward(backend, make_direction("GRU"), Rule())
