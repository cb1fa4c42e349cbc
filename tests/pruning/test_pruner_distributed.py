"""Two processes under DistributedDataParallel find the same masks; a sharded weight is refused."""

from pathlib import Path

import pytest
import torch
from pruner_training import gru
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn

from triton_sparse_rnn.pruning import OneShot, PolynomialDecay, Pruner
from triton_sparse_rnn.sparse.patterns import PatternLike
from triton_sparse_rnn.sparse.picks import Picks

SCHEDULE = PolynomialDecay(final_sparsity=0.7, begin_step=1, end_step=5, frequency=2)


def train_on_rank(rank: int, folder: Path, pattern: PatternLike, split: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # DistributedDataParallel sends rank 0's weights to all; data stay different
    layer = gru(5, 7)
    model = nn.parallel.DistributedDataParallel(layer)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    pruner = Pruner(model, SCHEDULE, pattern=pattern, split=split)
    pruner.attach(optimizer)
    for _ in range(7):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 5))[0].square().mean().backward()
        gradients = {name: layer.get_parameter(name).grad for name in pruner.masks}
        assert all(not gradients[name][~mask].any() for name, mask in pruner.masks.items())
        optimizer.step()
    result = {"pruner": pruner.state_dict(), "model": layer.state_dict(), "sharded": refusal_of_a_sharded_weight()}
    result["shared out"] = masks_of_a_shared_out_optimizer(pattern)
    torch.save(result, folder / f"rank{rank}.pt")
    distributed.destroy_process_group()


def masks_of_a_shared_out_optimizer(pattern: PatternLike) -> dict[str, torch.Tensor]:
    """ZeroRedundancyOptimizer steps a part of the weights on each rank, by an optimizer inside, and sends it to all."""
    from torch.distributed.optim import (
        ZeroRedundancyOptimizer,
    )  # here, since torch warns of itself while it is imported

    layer = gru(5, 7)
    model = nn.parallel.DistributedDataParallel(layer)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.02)
    pruner = Pruner(model, SCHEDULE, pattern=pattern)
    pruner.attach(optimizer)
    for step in range(7):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 5))[0].square().mean().backward()
        optimizer.step()
        assert pruner.step_count == step + 1
        for name, mask in pruner.masks.items():
            parameter = layer.get_parameter(name)
            state = [one for one in optimizer.optim.state[parameter].values() if one.shape == mask.shape]
            assert not any(tensor[~mask].any() for tensor in (parameter, *state))
    return {**pruner.masks, **layer.state_dict(prefix="model ")}


def refusal_of_a_sharded_weight() -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    layer = gru(4, 4)
    sharded = distribute_tensor(layer.weight_hh_l0.detach(), init_device_mesh("cpu", (2,)), [Shard(0)])
    layer.weight_hh_l0 = nn.Parameter(sharded)
    try:
        Pruner(layer, OneShot(sparsity=0.5, step=1))
    except TypeError as error:
        return str(error)
    return "accepted"


@pytest.mark.slow("processes")
@pytest.mark.skipif(not distributed.is_available(), reason="this torch is built without torch.distributed")
@pytest.mark.parametrize(("pattern", "split"), [((2, 1), "gate"), (Picks(2, 8), "gate"), ((2, 1), "layer")], ids=str)
def test_ranks_find_the_same_masks(pattern, split, tmp_path):
    spawn(train_on_rank, args=(tmp_path, pattern, split), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert first["pruner"]["step_count"] == second["pruner"]["step_count"] == 7
    assert list(first["pruner"]["weights"]) == ["weight_ih_l0", "weight_hh_l0"]  # without "module."
    for name, saved in first["pruner"]["weights"].items():
        assert torch.equal(saved["mask"], second["pruner"]["weights"][name]["mask"])
        assert (first["model"][name] == 0).float().mean() == pytest.approx(0.7, abs=0.05 if split == "gate" else 0.2)
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])
    assert first["shared out"].keys() == second["shared out"].keys()
    assert all(torch.equal(one, second["shared out"][name]) for name, one in first["shared out"].items())
    assert (~first["shared out"]["weight_hh_l0"]).float().mean() == pytest.approx(0.7, abs=0.05)
    assert "weight_hh_l0 must be a plain nn.Parameter, got a DTensor" in first["sharded"]
    plain = gru(5, 7)
    plain.load_state_dict(first["model"])
    Pruner(plain, SCHEDULE, pattern=pattern, split=split).load_state_dict(
        first["pruner"]
    )  # a model without the wrapper
