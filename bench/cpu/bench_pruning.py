"""What pruning adds to a training step of nn.GRU: forward, backward and Adam, on one thread.

The rows "alone" time the pruner's work without the step around it: it is a small part of a step, and on a busy
machine smaller than the difference between two runs of the same step.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from bench.workloads import pattern_name
from triton_sparse_rnn.pruning import OneShot, PolynomialDecay, Pruner
from triton_sparse_rnn.sparse.patterns import Blocks, Pattern
from triton_sparse_rnn.sparse.picks import Picks

H, B, T = 512, 32, 64
PATTERNS: list[Pattern] = [Blocks(16, 1), Picks(), Blocks(1, 1)]
FROZEN = OneShot(sparsity=0.9, step=1)
UPDATED = PolynomialDecay(initial_sparsity=0.5, final_sparsity=0.9, begin_step=1, end_step=100_000, frequency=1)
SCHEDULES = {"masks applied": FROZEN, "masks updated": UPDATED}


@pytest.mark.parametrize("contender", ["without pruner", *SCHEDULES])
@pytest.mark.parametrize("pattern", PATTERNS, ids=pattern_name)
def bench_training_step(benchmark, pattern: Pattern, contender: str):
    layer, optimizer, run = prepare_training()
    if contender in SCHEDULES:
        pruner = Pruner(layer, SCHEDULES[contender], pattern=pattern)
        pruner.attach(optimizer)
        run()
        assert_masked(layer, optimizer, pruner)
    describe(benchmark, pattern, contender)
    benchmark.pedantic(run, rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("contender", SCHEDULES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=pattern_name)
def bench_pruner_alone(benchmark, pattern: Pattern, contender: str):
    layer, optimizer, run = prepare_training()
    pruner = Pruner(layer, SCHEDULES[contender], pattern=pattern)
    run()
    pruner.step(optimizer)
    assert_masked(layer, optimizer, pruner)
    describe(benchmark, pattern, f"{contender}, alone")
    benchmark.pedantic(lambda: pruner.step(optimizer), rounds=20, warmup_rounds=2)


def prepare_training() -> tuple[nn.GRU, Optimizer, Callable[[], None]]:
    torch.manual_seed(0)
    layer, x = nn.GRU(H, H), torch.randn(T, B, H)
    optimizer = Adam(layer.parameters())

    def run() -> None:
        optimizer.zero_grad()
        layer(x)[0].square().mean().backward()
        optimizer.step()

    return layer, optimizer, run


def describe(benchmark, pattern: Pattern, contender: str) -> None:
    benchmark.group = f"training step GRU H={H} B={B} T={T} Adam, masks in {pattern_name(pattern)}"
    facts = {"T": T, "B": B, "I": H, "H": H, "threads": torch.get_num_threads(), "torch": torch.__version__}
    benchmark.extra_info.update(facts, contender=contender)


def assert_masked(layer: nn.GRU, optimizer: Optimizer, pruner: Pruner) -> None:
    for name, mask in pruner.masks.items():
        weight = layer.get_parameter(name)
        assert 0.4 < 1 - mask.float().mean() < 0.95
        for tensor in (weight, weight.grad, *optimizer.state[weight].values()):
            assert isinstance(tensor, Tensor)
            assert tensor.dim() == 0 or not tensor[~mask].any()
