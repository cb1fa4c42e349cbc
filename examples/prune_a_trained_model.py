"""A checkpoint of an nn.GRU, pruned gradually, fine-tuned with its mask kept, and saved for inference.

The model predicts the next byte of the sources of Python's standard library. First it is trained as anybody would, with
nn.GRU, and saved; that file stands for the checkpoint you have. Then

1. the checkpoint is loaded into an nn.GRU as before, and `sparsify` makes that a SparseGRU in place;
2. training goes on while a pruner removes 90 % of the weights and the model's former self teaches it; the result is a
   plain state_dict again, for any nn.GRU;
3. a fresh model loads that file, and is fine-tuned at a lower rate with `ConstantMask`, which keeps the zeros it finds;
4. the model is converted, and saved in one file without the zeros.

The table shows bits per byte of held-out text after each. About a minute on one core; --quick about 5 seconds.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from triton_sparse_rnn import (
    ConstantMask,
    Distillation,
    Picks,
    PolynomialDecay,
    Pruner,
    load_sparse,
    save_sparse,
    sparsify,
    to_sparse,
)
from triton_sparse_rnn.pruning import Schedule

Text = tuple[Tensor, Tensor]  # streams to train on, and held-out ones: bytes [time, streams]


class ByteModel(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        self.rnn = nn.GRU(64, hidden_size)
        self.head = nn.Linear(hidden_size, 256)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(ids))[0])


def load_text() -> Text:
    data = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py"))[:100])
    ids = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    streams = ids[: len(ids) // 40 * 40].view(40, -1).T.contiguous()
    return streams[:, :32], streams[:2000, 32:]


def bits_per_byte(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids[:-1]).flatten(0, 1), ids[1:].flatten()) / torch.log(torch.tensor(2.0))


def train(
    model: nn.Module,
    text: Text,
    steps: int,
    rate: float,
    schedule: Schedule | None = None,
    distillation: Distillation | None = None,
) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    final = 0 if schedule is None else schedule.last_step
    if schedule is not None:
        Pruner(model, schedule, pattern=Picks()).attach(optimizer)
    rates = LambdaLR(optimizer, lambda step: min(1.0, (steps - step) / (steps - final)) if final else 1.0)
    for step in range(steps):
        start = step * 64 % (len(text[0]) - 65)
        optimizer.zero_grad()
        loss = bits_per_byte(model, text[0][start : start + 65])
        if distillation is not None:
            loss = loss + distillation.loss()
        loss.backward()
        optimizer.step()
        rates.step()  # falls to 0 once the mask is final


@torch.inference_mode()
def show(stage: str, model: nn.Module, text: Text, file: Path) -> None:
    print(f"{stage:36} {bits_per_byte(model, text[1]).item():6.3f} bits per byte {file.stat().st_size:10,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short training, a few seconds")
    parser.add_argument("--output", type=Path, default=Path("pruned-model"), help="a folder [%(default)s]")
    options = parser.parse_args()
    hidden_size, steps = (64, 20) if options.quick else (256, 250)
    options.output.mkdir(parents=True, exist_ok=True)
    dense, pruned, sparse = (options.output / name for name in ("dense.pt", "pruned.pt", "sparse.safetensors"))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text = load_text()

    model = ByteModel(hidden_size)
    train(model, text, steps, 3e-3)
    torch.save(model.state_dict(), dense)
    show("nn.GRU, trained", model, text, dense)

    model = ByteModel(hidden_size)
    model.load_state_dict(torch.load(dense))
    with Distillation(sparsify(model)) as distillation:
        train(model, text, steps, 3e-3, PolynomialDecay.for_training(steps, final_sparsity=0.9), distillation)
    torch.save(model.state_dict(), pruned)
    show("pruned to 90 %", model, text, pruned)

    model = ByteModel(hidden_size)
    model.load_state_dict(torch.load(pruned))
    train(model, text, steps, 5e-4, ConstantMask())
    save_sparse(to_sparse(model.eval()), sparse)
    show("fine-tuned, zeros kept, converted", load_sparse(ByteModel(hidden_size), sparse), text, sparse)


if __name__ == "__main__":
    main()
