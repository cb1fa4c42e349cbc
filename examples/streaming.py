"""A stream, one frame at a time: a GRU predicts the next frame of a signal, and every step is timed.

Two models learn from the same frames: one with nn.GRU, and one with SparseGRU, which is pruned to 90 % zeros meanwhile.
Then both run as a service would, at batch 1 on one thread. The table shows the mean squared error of the predictions
(0.0025 of it is noise in the frames, which nobody can predict), and how long one step takes, from a frame to the
prediction, in microseconds: median, and what 1 of 20 and 1 of 100 steps exceed.

About a minute on one core. --quick takes about 5 seconds, and trains too little for the errors to mean anything.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor, nn

from triton_sparse_rnn import PolynomialDecay, Pruner, SparseGRU, to_sparse

CHANNELS, WAVES, STEPS, BATCH = 16, 8, 64, 16


class Predictor(nn.Module):
    def __init__(self, rnn: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(hidden_size, CHANNELS)

    def forward(self, frames: Tensor) -> Tensor:
        return self.head(self.rnn(frames)[0])


def signal(steps: int, batch: int, seed: int) -> Tensor:
    """Return frames [steps, batch, CHANNELS]: waves of fixed pitch and random phase and loudness, mixed, with noise."""
    fixed, drawn = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    pitch = 0.05 + 0.6 * torch.rand(WAVES, generator=fixed)
    mixture = torch.randn(WAVES, CHANNELS, generator=fixed)
    phase = 6.3 * torch.rand(batch, WAVES, generator=drawn)
    loudness = torch.rand(batch, WAVES, generator=drawn)
    waves = loudness * torch.sin(pitch * torch.arange(steps)[:, None, None] + phase)
    return torch.tanh(waves @ mixture / 2) + 0.05 * torch.randn(steps, batch, CHANNELS, generator=drawn)


def error(predicted: Tensor, frames: Tensor) -> Tensor:
    return (predicted - frames).square().mean()


def train(model: Predictor, total_steps: int, *, pruned: bool) -> Predictor:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    if pruned:
        Pruner(model, PolynomialDecay.for_training(total_steps)).attach(optimizer)
    for step in range(total_steps):
        frames = signal(STEPS + 1, BATCH, seed=1 + step)
        optimizer.zero_grad()
        error(model(frames[:-1]), frames[1:]).backward()
        optimizer.step()
    return model.eval()


@torch.inference_mode()
def stream(model: Any, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Feed frames [T, 1, CHANNELS] one by one; return the predictions and the microseconds of each step."""
    step = model.rnn.step if hasattr(model.rnn, "step") else lambda x, h: model.rnn(x.unsqueeze(0), h)
    h, predicted, microseconds = None, [], []
    for frame in frames:
        start = time.perf_counter_ns()
        y, h = step(frame, h)
        predicted.append(model.head(y).view(1, CHANNELS))
        microseconds.append((time.perf_counter_ns() - start) / 1000)
    return torch.stack(predicted), torch.tensor(microseconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short training, a few seconds")
    quick = parser.parse_args().quick
    hidden_size, total_steps, streamed = (128, 20, 300) if quick else (256, 600, 5000)
    torch.set_num_threads(1)

    torch.manual_seed(0)
    dense = train(Predictor(nn.GRU(CHANNELS, hidden_size), hidden_size), total_steps, pruned=False)
    torch.manual_seed(0)
    pruned = train(Predictor(SparseGRU(CHANNELS, hidden_size), hidden_size), total_steps, pruned=True)
    fast: Any = to_sparse(pruned)
    fast.rnn.warm_up()  # compile before the first frame

    frames = signal(streamed + 1, 1, seed=0)
    print(f"{'':25}  error   median    95 %    99 %")
    print(f"{'the last frame again':25}  {error(frames[:-1], frames[1:]):.4f}")
    for name, model in (("nn.GRU", dense), ("PersistentGRU, 90 % zeros", fast)):
        predicted, microseconds = stream(model, frames[:-1])
        median, most, worst = microseconds[10:].quantile(torch.tensor([0.5, 0.95, 0.99])).tolist()
        print(f"{name:25}  {error(predicted, frames[1:]):.4f}  {median:6.1f}  {most:6.1f}  {worst:6.1f}")


if __name__ == "__main__":
    main()
