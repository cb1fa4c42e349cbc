"""A denoiser in C: trained and pruned in Python, then a filter of a few files that needs no Python.

A SparseGRU and a linear layer learn to take the noise out of a signal of 16 channels, frame by frame, while the GRU is
pruned to 90 % zeros. Both are exported as one chain, and built with examples/stream.c into a program that reads frames
from standard input and writes them to standard output. The table shows the mean squared error of the frames, and how
far the program is from the model.

It needs a C compiler, cc. About a minute on one core. --quick takes about 5 seconds, and trains too little for the
errors to mean anything.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from triton_sparse_rnn import PolynomialDecay, Pruner, SparseGRU, export_c, to_sparse

CHANNELS, WAVES, STEPS, BATCH, NOISE = 16, 8, 64, 16, 0.3
FILTER = Path(__file__).resolve().parent / "stream.c"


class Denoiser(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.rnn = SparseGRU(CHANNELS, hidden_size)
        self.head = nn.Linear(hidden_size, CHANNELS)

    def forward(self, frames: Tensor) -> Tensor:
        return self.head(self.rnn(frames)[0])


def signal(steps: int, batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return frames [steps, batch, CHANNELS], with noise and clean: waves of fixed pitch and random phase, mixed."""
    fixed, drawn = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    pitch = 0.05 + 0.6 * torch.rand(WAVES, generator=fixed)
    mixture = torch.randn(WAVES, CHANNELS, generator=fixed)
    phase = 6.3 * torch.rand(batch, WAVES, generator=drawn)
    clean = torch.tanh(torch.sin(pitch * torch.arange(steps)[:, None, None] + phase) @ mixture / 2)
    return clean + NOISE * torch.randn(clean.shape, generator=drawn), clean


def error(frames: Tensor, clean: Tensor) -> Tensor:
    return (frames - clean).square().mean()


def train(hidden_size: int, total_steps: int) -> Denoiser:
    model = Denoiser(hidden_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    Pruner(model, PolynomialDecay.for_training(total_steps)).attach(optimizer)
    for step in range(total_steps):
        noisy, clean = signal(STEPS, BATCH, seed=1 + step)
        optimizer.zero_grad()
        error(model(noisy), clean).backward()
        optimizer.step()
    return model.eval()


def build(folder: Path) -> Path:
    """Compile the filter with the runtime that was exported."""
    program = folder / "stream"
    command = f"cc -std=c11 -O3 -march=native -I {folder} -o {program} {FILTER} {folder / 'tsr_runtime.c'}"
    subprocess.run(shlex.split(command), check=True)
    return program


def run(program: Path, weights: Path, frames: Tensor) -> Tensor:
    """Feed frames [steps, 1, CHANNELS] to the filter."""
    done = subprocess.run([program, weights], input=frames.numpy().tobytes(), stdout=subprocess.PIPE, check=True)
    return torch.frombuffer(bytearray(done.stdout), dtype=torch.float32).view(frames.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short training, a few seconds")
    quick = parser.parse_args().quick
    hidden_size, total_steps, streamed = (64, 20, 300) if quick else (256, 600, 5000)
    torch.set_num_threads(1)

    torch.manual_seed(0)
    fast: Any = to_sparse(train(hidden_size, total_steps))
    noisy, clean = signal(streamed, 1, seed=0)
    with torch.inference_mode():
        in_python = fast(noisy)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_c(fast, folder, chain=["rnn", "head"], name="denoiser")
        program, weights = build(folder), folder / "denoiser.bin"
        in_c = run(program, weights, noisy)
        sizes = f"{weights.stat().st_size:,} bytes of weights, {program.stat().st_size:,} of program"

    print(f"{'':20}  error")
    print(f"{'with noise':20}  {error(noisy, clean):.4f}")
    print(f"{'in Python':20}  {error(in_python, clean):.4f}")
    print(f"{'in C':20}  {error(in_c, clean):.4f}  largest difference {(in_c - in_python).abs().max():.0e}, {sizes}")


if __name__ == "__main__":
    main()
