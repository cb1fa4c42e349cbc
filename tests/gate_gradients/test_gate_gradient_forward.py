"""What the tests of run_layer do not reach: weights for cuDNN, on a machine that may have none."""

import math

import torch
from torch import Tensor

from triton_sparse_rnn.gate_gradients import forward

I, H, R = 5, 7, 3


def test_weights_that_are_in_one_piece_are_not_copied(monkeypatch):
    calls = []
    monkeypatch.setattr(forward._VF, "_cudnn_rnn_flatten_weight", lambda *args: calls.append(args), raising=False)
    monkeypatch.setattr(forward.cudnn_rnn, "get_cudnn_mode", lambda mode: mode)
    shapes = [(4 * H, I), (4 * H, R), (4 * H,), (4 * H,), (R, H)] * 2
    flat = torch.randn(sum(math.prod(shape) for shape in shapes))
    pieces = flat.split([math.prod(shape) for shape in shapes])
    weights = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def compact(weights: list[Tensor]) -> list[Tensor]:
        return forward._compact(weights, "LSTM", [forward.Weights(*weights[:5]), forward.Weights(*weights[5:])])

    assert compact(weights) is weights
    assert not calls
    longer = torch.randn(len(flat) + 1)  # of a stack, say
    parts = longer[:-1].split([len(piece) for piece in pieces])
    part_of_more = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    for others in ([*weights[:9], weights[9].clone()], part_of_more):
        copies = compact(others)
        assert all(torch.equal(a, b) and a is not b for a, b in zip(copies, others, strict=True))
        assert calls.pop() == (copies, 5, I, "LSTM", H, R, 1, False, True)
