"""What pruning adds to a training step of nn.GRU: forward, backward and Adam, on one thread."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from triton_sparse_rnn.pruning import OneShot, PolynomialDecay, Pruner

H, B, T = 512, 32, 64
BLOCK_SIZES = [(16, 1), (1, 1)]
FROZEN = OneShot(sparsity=0.9, step=1)
UPDATED = PolynomialDecay(initial_sparsity=0.5, final_sparsity=0.9, begin_step=1, end_step=100_000, frequency=1)
SCHEDULES = {"plain": None, "masks applied": FROZEN, "masks updated": UPDATED}


@pytest.mark.parametrize("contender", SCHEDULES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
def bench_training_step(benchmark, block_size: tuple[int, int], contender: str):
    torch.manual_seed(0)
    layer, x = nn.GRU(H, H), torch.randn(T, B, H)
    optimizer = torch.optim.Adam(layer.parameters())
    schedule = SCHEDULES[contender]
    pruner = None if schedule is None else Pruner(layer, schedule, block_size=block_size)
    if pruner is not None:
        pruner.attach(optimizer)
    run = training_step(layer, optimizer, x)
    run()
    assert_masked(layer, optimizer, pruner)
    benchmark.group = f"training step GRU H={H} B={B} T={T} Adam, block {block_size}"
    benchmark.extra_info.update(
        T=T, B=B, I=H, H=H, contender=contender, threads=torch.get_num_threads(), torch=torch.__version__
    )
    benchmark.pedantic(run, rounds=10, warmup_rounds=2)


def training_step(layer: nn.GRU, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        optimizer.zero_grad()
        layer(x)[0].square().mean().backward()
        optimizer.step()

    return run


def assert_masked(layer: nn.GRU, optimizer: torch.optim.Optimizer, pruner: Pruner | None) -> None:
    for name, mask in ({} if pruner is None else pruner.masks).items():
        weight = layer.get_parameter(name)
        assert 0.4 < 1 - mask.float().mean() < 0.95
        for tensor in (weight, weight.grad, optimizer.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg_sq"]):
            assert tensor is not None
            assert not tensor[~mask].any()
