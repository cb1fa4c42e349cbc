"""A converted model under torch.compile and torch.export: one graph without breaks, and one file for any T and B.

The model's GRU is pruned in one go here, untrained, since only its form matters. It is converted, compiled with
fullgraph=True, exported with dynamic time steps and batch, saved, and loaded as another process would. Each must give
what the converted model gives, to the bit; the largest difference is shown. A process that loads the file needs this
package installed, and `import triton_sparse_rnn` first, which registers the operators that the graph calls.

About 20 seconds on one core, most of it torch.compile's; --quick, without its C++ backend, about 5.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from triton_sparse_rnn import OneShot, Pruner, SparseGRU, to_sparse

INPUT, HIDDEN, CLASSES = 40, 256, 10


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = SparseGRU(INPUT, HIDDEN, num_layers=2)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, h = self.rnn(x, h)
        return self.head(y), h


def inputs(T: int, B: int) -> tuple[Tensor, Tensor]:
    return torch.randn(T, B, INPUT), torch.zeros(2, B, HIDDEN)


def prune_at_once(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = Pruner(model, OneShot(sparsity=0.9, step=1))
    pruner.step(optimizer)


@torch.inference_mode()
def show(name: str, run: Any, model: nn.Module) -> None:
    """Compare on other sizes than those that were compiled or exported."""
    differences = []
    for T, B in ((50, 1), (7, 3)):
        arguments = inputs(T, B)
        differences += [(a - b).abs().max().item() for a, b in zip(run(*arguments), model(*arguments), strict=True)]
    print(f"{name:36} largest difference {max(differences):.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="compile without a C++ compiler, a few seconds")
    parser.add_argument("--output", type=Path, default=Path("classifier.pt2"), help="a file [%(default)s]")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    model = Classifier().eval()
    prune_at_once(model)
    fast = to_sparse(model)

    compiled = torch.compile(fast, fullgraph=True, backend="eager" if options.quick else "inductor")
    show("torch.compile(fullgraph=True)", compiled, fast)

    T, B = Dim("T", min=2), Dim("B", min=2)  # the sample has T, B > 1, or they would become constants
    exported = torch.export.export(fast, inputs(5, 2), dynamic_shapes=({0: T, 1: B}, {1: B}))
    torch.export.save(exported, options.output)
    loaded = torch.export.load(options.output).module()
    show("torch.export, saved and loaded", loaded, fast)


if __name__ == "__main__":
    main()
