"""Layers of every cell and dtype, and backwards, checked in a process that compiles for another processor.

Run with "quantised" it takes only those with quantised activations and those in picks. Prints the vector path, whether
bytes are multiplied and permuted by an instruction, and whether halves are converted by one.
"""

import sys

import torch
from cpu_layers import Layer, assert_as_accurate_as_torch

from triton_sparse_rnn.gate_gradients.backends import cpu, reference
from triton_sparse_rnn.gate_gradients.contract import Arriving, BackwardDirection, Decision, Needed, Rule, Steps
from triton_sparse_rnn.kernels.cpu import target
from triton_sparse_rnn.ops.backends.reference import recurrent_layer
from triton_sparse_rnn.sparse.picks import Picks

WIDE = [
    ("RNN_TANH", (16, 4), torch.float32),
    ("GRU", (5, 3), torch.float16),
    ("RNN_RELU", (16, 4), torch.bfloat16),
    ("LSTM projected", (16, 4), torch.int8),
]
PICKED = [
    ("GRU", Picks(), torch.float32),
    ("LSTM projected", Picks(8, 16), torch.float16),
    ("RNN_TANH", Picks(16, 64, 2), torch.int8),
    ("RNN_RELU", Picks(7, 8), torch.float32),
]
QUANTIZED = [("GRU", (16, 4)), ("LSTM", (5, 3)), ("LSTM", Picks(16, 64, 4)), ("RNN_RELU", Picks(16, 16))]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for mode, pattern, dtype in PICKED if "quantised" in sys.argv else WIDE + PICKED:
        layer = Layer(mode, 21, 53, pattern, pattern, dtype=dtype)
        assert_as_accurate_as_torch(layer, [15, 9, 5, 4, 3, 2, 1, 1])
    for mode, pattern in QUANTIZED:
        layer = Layer(mode, 21, 53, pattern, pattern, dtype=torch.int8)
        x, states = layer.random_inputs([15])
        ours = layer.ready(quantized=True)(x, states, None)
        expected = recurrent_layer(x, states, layer.directions, None, layer.mode, activation_dtype=torch.int8)
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)
    for rule in (Rule(), Rule("sample"), Rule("sample", "blocks", 5, 2)):
        check_backward(rule)
    bytes_too = target.multiplies_bytes(), target.permutes_bytes()
    print(target.vector_path(), *bytes_too, target.converts_half(), sep="|")


def check_backward(rule: Rule) -> None:
    """The gradients of an LSTM, in which more than half of the gate gradients are made zero, are the reference's."""
    sizes, I, H = (6, 6, 5, 2, 1), 21, 37
    N, B = sum(sizes), sizes[0]
    x, y, h0, c0 = (torch.randn(rows, size).tanh() for rows, size in ((N, I), (N, H), (B, H), (B, H)))
    weights = (torch.randn(4 * H, I) / I, torch.randn(4 * H, H) / H, torch.randn(4 * H), torch.randn(4 * H))
    direction = BackwardDirection("LSTM", Steps(sizes, True), x, y, h0, c0, *weights, weight_hr=None, workspace=None)
    arriving = Arriving(torch.randn(N, H), torch.randn(B, H), torch.randn(B, H))
    thresholds = torch.full((4 if rule.group == "elements" else 1,), 0.3)
    decision = Decision(rule, thresholds, torch.tensor([5]), likely_zeros=0.9, keep_gates=True)
    call = (direction, arriving, Needed(True, True, True, True, False), decision)
    ours, expected = cpu.direction_gradients(*call), reference.direction_gradients(*call)
    assert ours.zeros.sum() > 2 * N * H
    for gradient, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-5, atol=2e-5)


if __name__ == "__main__":
    main()
