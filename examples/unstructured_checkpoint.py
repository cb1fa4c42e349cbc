"""A checkpoint with single zeros, pruned by torch.nn.utils.prune and not for this package, run from its zeros.

The model predicts the next byte of the sources of Python's standard library.

1. An nn.GRU is trained, and torch prunes 90 % of its weights one by one, in three steps with training in between. What
   is saved is a plain state_dict: it stands for the checkpoint that you found somewhere.
2. `sparsity_report` of the file says how the weights would be stored: in picks, filled up where rows of a unit group
   have fewer zeros than others.
3. `to_sparse` converts a fresh model with these weights; nothing was pruned by this package.

The table shows bits per byte of held-out text, and the time of a step of the layer, on one thread, batch 1. About a
minute on one core; --quick about 5 seconds.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from triton_sparse_rnn import sparsity_report, to_sparse

PRUNED = ("weight_ih_l0", "weight_hh_l0")


class ByteModel(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        self.rnn = nn.GRU(64, hidden_size)
        self.head = nn.Linear(hidden_size, 256)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(ids))[0])


def load_text() -> tuple[Tensor, Tensor]:
    """Return streams to train on, and held-out ones: bytes [time, streams]."""
    data = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py"))[:100])
    ids = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    streams = ids[: len(ids) // 40 * 40].view(40, -1).T.contiguous()
    return streams[:, :32], streams[:2000, 32:]


def bits_per_byte(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids[:-1]).flatten(0, 1), ids[1:].flatten()) / torch.log(torch.tensor(2.0))


def train(model: nn.Module, streams: Tensor, steps: int, rate: float) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for step in range(steps):
        start = step * 64 % (len(streams) - 65)
        optimizer.zero_grad()
        bits_per_byte(model, streams[start : start + 65]).backward()
        optimizer.step()


@torch.inference_mode()
def show(stage: str, model: ByteModel, held_out: Tensor, steps: int) -> None:
    x = torch.randn(steps, 1, model.rnn.input_size)
    model.rnn(x)  # compile, and warm up
    begin = time.perf_counter()
    model.rnn(x)
    microseconds = (time.perf_counter() - begin) / steps * 1e6
    print(f"{stage:36} {bits_per_byte(model, held_out).item():6.3f} bits per byte {microseconds:8.2f} us a step")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short training, a few seconds")
    parser.add_argument("--output", type=Path, default=Path("unstructured.pt"), help="a file [%(default)s]")
    options = parser.parse_args()
    hidden_size, steps = (64, 10) if options.quick else (512, 100)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    streams, held_out = load_text()

    model = ByteModel(hidden_size)
    train(model, streams, 2 * steps, 3e-3)
    show("nn.GRU, trained", model, held_out, steps)
    for amount in (0.5, 0.6, 0.5):  # of what is left: 50, 80, 90 %
        for name in PRUNED:
            prune.l1_unstructured(model.rnn, name, amount=amount)
        train(model, streams, steps, 2e-3)
    for name in PRUNED:
        prune.remove(model.rnn, name)
    torch.save(model.state_dict(), options.output)

    found = ByteModel(hidden_size)
    found.load_state_dict(torch.load(options.output))
    print(f"\n{sparsity_report(found.rnn)}\n")
    show("nn.GRU, 90 % single zeros", found.eval(), held_out, steps)
    show("converted, in picks", to_sparse(found), held_out, steps)


if __name__ == "__main__":
    main()
