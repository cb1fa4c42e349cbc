"""Layers of every cell and dtype, checked in a process that compiles for another processor.

Run with "quantised" it takes only those with quantised activations. Prints the vector path, whether bytes are
multiplied by an instruction, and whether halves are converted by one.
"""

import sys

import torch
from cpu_layers import Layer, assert_as_accurate_as_torch

from triton_sparse_rnn.kernels.cpu import target
from triton_sparse_rnn.ops.reference import recurrent_layer

WIDE = [
    ("RNN_TANH", (16, 4), torch.float32),
    ("GRU", (5, 3), torch.float16),
    ("RNN_RELU", (16, 4), torch.bfloat16),
    ("LSTM projected", (16, 4), torch.int8),
]
QUANTIZED = [("GRU", (16, 4)), ("LSTM", (5, 3))]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for mode, block_size, dtype in [] if "quantised" in sys.argv else WIDE:
        layer = Layer(mode, 21, 53, block_size, block_size, dtype=dtype)
        assert_as_accurate_as_torch(layer, [15, 9, 5, 4, 3, 2, 1, 1])
    for mode, block_size in QUANTIZED:
        layer = Layer(mode, 21, 53, block_size, block_size, dtype=torch.int8)
        x, states = layer.random_inputs([15])
        ours = layer.ready(quantized=True)(x, states, None)
        expected = recurrent_layer(x, states, layer.weights(), None, layer.mode, activation_dtype=torch.int8)
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)
    print(target.vector_path(), target.multiplies_bytes(), target.converts_half(), sep="|")


if __name__ == "__main__":
    main()
