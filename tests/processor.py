"""What torch cannot do on every processor."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn


@functools.cache
def lstm_runs_under_autocast() -> bool:
    """Whether oneDNN has an LSTM in bfloat16 for the instructions of this processor; without, nn.LSTM raises."""
    try:
        with torch.autocast("cpu", torch.bfloat16):
            nn.LSTM(2, 2)(torch.zeros(1, 1, 2))
    except RuntimeError as error:
        assert "primitive" in str(error)  # noqa: PT017 - any other error is one
        return False
    return True


def skip_where_torch_cannot_autocast(dense_class: type[nn.Module]) -> None:
    if dense_class is nn.LSTM and not lstm_runs_under_autocast():
        pytest.skip("torch has no LSTM in bfloat16 for this processor")
