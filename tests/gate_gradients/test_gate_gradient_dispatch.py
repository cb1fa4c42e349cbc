from typing import Any

import pytest
import torch

from triton_sparse_rnn.errors import BackendUnavailableError
from triton_sparse_rnn.gate_gradients.backends import cpu, reference
from triton_sparse_rnn.gate_gradients.contract import Direction, Rule, Steps
from triton_sparse_rnn.gate_gradients.dispatch import choose_backward

I, H = 5, 7


def make_direction(mode: Any, *, B: int = 3, dtype: torch.dtype = torch.float32, proj_size: int = 0) -> Direction:
    """A direction of two steps."""
    G, R = 4 if mode == "LSTM" else 3, proj_size or H
    return Direction(
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
    assert choose_backward(None, make_direction("LSTM"), Rule()) is cpu.direction_gradients
    for direction, rule in [
        (make_direction("GRU"), Rule()),
        (make_direction("LSTM", dtype=torch.float64), Rule()),
        (make_direction("LSTM", proj_size=3), Rule()),
        (make_direction("LSTM"), Rule("top")),
        (make_direction("LSTM", B=0), Rule()),
    ]:
        assert choose_backward(None, direction, rule) is reference.direction_gradients
    assert choose_backward("reference", make_direction("LSTM"), Rule()) is reference.direction_gradients


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_named_backend_runs_or_raises(backend):
    with pytest.raises(BackendUnavailableError, match=f"'{backend}' cannot run the backward of this layer: .*float64"):
        choose_backward(backend, make_direction("LSTM", dtype=torch.float64), Rule())
    with pytest.raises(BackendUnavailableError, match=r"GRU.*backend=None takes the fastest one that can"):
        choose_backward(backend, make_direction("GRU", B=0), Rule())


def test_a_backend_that_there_is_not():
    with pytest.raises(ValueError, match="backend must be None or one of 'triton', 'cpu', 'reference', got 'numba'"):
        choose_backward("numba", make_direction("LSTM"), Rule())
