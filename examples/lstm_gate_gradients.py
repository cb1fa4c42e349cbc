"""Cheaper LSTM training: small gate gradients become zero, alone and while the weights are pruned too.

A model that predicts the next byte of the sources of Python's standard library is trained three times, from the same
weights, on the same text: as it is; with 80 % of the gate gradients made zero in every backward; and with that and a
pruner that removes 90 % of the weights. The table shows bits per byte of held-out text, the share of gate gradients
that were zero, the share of all multiply-accumulates of the LSTM's training that this makes redundant, and the seconds
of all backward passes on one thread, the decoder's among them (the first one compiles). Forward is torch's own in any
case. One seed and a short training: differences of some 0.01 bits mean nothing.

About a minute on one core; --quick about 5 seconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triton_sparse_rnn import GateGradientSparsity, PolynomialDecay, Pruner, SparseLSTM


class ByteModel(nn.Module):
    def __init__(self, hidden_size: int, gate_gradient: GateGradientSparsity | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        self.rnn = SparseLSTM(64, hidden_size, gate_gradient=gate_gradient)
        self.head = nn.Linear(hidden_size, 256)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(ids))[0])


def load_text() -> tuple[Tensor, Tensor]:
    """Return bytes [time, streams], to train on and held out."""
    data = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py"))[:100])
    ids = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    streams = ids[: len(ids) // 40 * 40].view(40, -1).T.contiguous()
    return streams[:, :32], streams[:2000, 32:]


def bits_per_byte(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids[:-1]).flatten(0, 1), ids[1:].flatten()) / torch.log(torch.tensor(2.0))


def train(model: ByteModel, ids: Tensor, steps: int, *, pruned: bool) -> float:
    """Train, and return the seconds of all backward passes."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    if pruned:
        Pruner(model, PolynomialDecay.for_training(steps, final_sparsity=0.9)).attach(optimizer)
    seconds = 0.0
    for step in range(steps):
        start = step * 64 % (len(ids) - 65)
        loss = bits_per_byte(model, ids[start : start + 65])
        optimizer.zero_grad()
        seconds -= time.perf_counter()
        loss.backward()
        seconds += time.perf_counter()
        optimizer.step()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short training, a few seconds")
    quick = parser.parse_args().quick
    hidden_size, steps = (64, 12) if quick else (256, 250)
    torch.set_num_threads(1)
    training_text, held_out = load_text()

    print(f"{'':30} bits per byte   zeros   redundant   backward")
    for name, sparse, pruned in (
        ("nn.LSTM's backward", False, False),
        ("80 % of gate gradients zero", True, False),
        ("and 90 % of the weights pruned", True, True),
    ):
        torch.manual_seed(0)
        model = ByteModel(hidden_size, GateGradientSparsity(target=0.8) if sparse else None)
        seconds = train(model, training_text, steps, pruned=pruned)
        with torch.inference_mode():
            bits = bits_per_byte(model.eval(), held_out).item()
        stats = model.rnn.gate_gradient_stats
        zeros = statistics.mean(stats.mean_zeros["l0"].values()) if stats is not None else 0.0
        redundant = stats.mean_redundant_macs if stats is not None else 0.0
        print(f"{name:30} {bits:13.3f} {zeros:7.1%} {redundant:11.1%} {seconds:8.1f} s")


if __name__ == "__main__":
    main()
