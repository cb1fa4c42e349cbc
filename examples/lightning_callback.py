"""An LSTM pruned by a Lightning Trainer, interrupted and resumed on the way, then converted and saved.

The model sees noisy sine waves of random frequency and phase, and predicts the next value. `PrunerCallback` is the one
line that pruning takes; the rest is an ordinary LightningModule. Training stops in the middle and goes on from the
checkpoint, masks included. The table shows the error on new waves (guessing that the next value is the last one is the
yardstick), the bytes of the recurrent layer, and the time of a step of a single stream, on one thread.

About 40 seconds; --quick about 5 seconds.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from triton_sparse_rnn import load_sparse, save_sparse, to_sparse
from triton_sparse_rnn.integrations.lightning import PrunerCallback

warnings.filterwarnings("ignore", ".*does not have many workers")  # the data is in memory


class NextValue(LightningModule):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(1, hidden_size, batch_first=True)
        self.head = nn.Linear(hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])

    def training_step(self, x: Tensor, index: int) -> Tensor:
        return (self(x[:, :-1]) - x[:, 1:]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class StopAfter(Callback):
    """Stands for whatever interrupts a training."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 == self.epochs


def make_waves(count: int) -> Tensor:
    """Draw [count, 41, 1]."""
    frequency, phase = torch.rand(2, count, 1, 1) * torch.tensor([0.5, 6.3]).view(2, 1, 1, 1)
    return torch.sin((0.2 + frequency) * torch.arange(41.0)[:, None] + phase) + 0.05 * torch.randn(count, 41, 1)


def make_trainer(folder: Path, epochs: int, *callbacks: Callback) -> Trainer:
    # Of a single column of inputs nothing is to be gained: that weight stays dense.
    pruner = PrunerCallback(final_sparsity=0.9, targets={"*.weight_ih_l0": None})
    return Trainer(
        max_epochs=epochs,
        callbacks=[pruner, *callbacks],
        default_root_dir=folder,
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@torch.inference_mode()
def show(name: str, model: NextValue, waves: Tensor) -> None:
    error = (model(waves[:, :-1]) - waves[:, 1:]).square().mean().sqrt().item()
    stream, steps = waves[:1].repeat(1, 5, 1), waves.shape[1] * 5
    model(stream)
    start = time.perf_counter()
    model(stream)
    microseconds = (time.perf_counter() - start) / steps * 1e6
    stored = sum(tensor.nbytes for tensor in model.rnn.state_dict().values())
    print(f"{name:30} {error:8.4f} {stored:10,} {microseconds:8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model and a short training")
    parser.add_argument("--output", type=Path, default=Path("pruned-by-lightning"), help="a folder [%(default)s]")
    options = parser.parse_args()
    hidden_size, epochs = (64, 4) if options.quick else (256, 12)
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    loader = DataLoader(make_waves(960), batch_size=32, shuffle=True)  # type: ignore[arg-type]
    held_out = make_waves(200)

    trainer = make_trainer(options.output, epochs, StopAfter(epochs // 4))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "training ended at step")  # the pruner says that it was not done
        trainer.fit(NextValue(hidden_size), loader)
    trainer.save_checkpoint(options.output / "middle.ckpt")

    model = NextValue(hidden_size)
    trainer = make_trainer(options.output, epochs)
    trainer.fit(model, loader, ckpt_path=options.output / "middle.ckpt")
    print(f"resumed after epoch {epochs // 4}, {trainer.callback_metrics['sparsity']:.1%} of weight_hh_l0 pruned")

    guess = (held_out[:, 1:] - held_out[:, :-1]).square().mean().sqrt().item()
    print(f"\n{'':30} {'error':>8} {'bytes':>10} {'µs/step':>8}\n{'the last value again':30} {guess:8.4f}")
    show("pruned, as nn.LSTM", model.eval(), held_out)
    save_sparse(to_sparse(model), options.output / "sparse.safetensors")
    loaded = load_sparse(NextValue(hidden_size).eval(), options.output / "sparse.safetensors")
    show("converted, saved and loaded", loaded, held_out)


if __name__ == "__main__":
    main()
