import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from triton_sparse_rnn.pruning import ConstantMask, OneShot, PolynomialDecay, Pruner, ThresholdRamp
from triton_sparse_rnn.sparse.patterns import Blocks
from triton_sparse_rnn.sparse.picks import Picks

OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.02),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.003, momentum=0.9),
}
SCHEDULES = {
    "decay": PolynomialDecay(final_sparsity=0.8, begin_step=1, end_step=9, frequency=2),
    "ramp": ThresholdRamp(q=0.2, begin_step=0, ramp_step=3, end_step=9, frequency=3),
    "once": OneShot(sparsity=0.6, step=7),
}
DECAY = SCHEDULES["decay"]


class Run:
    """A training that can be saved, and loaded into a new one of other initial weights."""

    def __init__(self, schedule, optimizer, seed, **options):
        torch.manual_seed(seed)
        self.layer = nn.GRU(5, 7, num_layers=2)
        self.optimizer = OPTIMIZERS[optimizer](self.layer.parameters())
        self.pruner = Pruner(self.layer, schedule, **options)
        self.pruner.attach(self.optimizer)

    def train(self, steps):
        for seed in steps:
            self.optimizer.zero_grad()
            x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(seed))
            self.layer(x)[0].square().mean().backward()
            nn.utils.clip_grad_norm_(self.layer.parameters(), 0.1)
            self.optimizer.step()

    def parts(self):
        return {"pruner": self.pruner, "model": self.layer, "optimizer": self.optimizer}

    def save(self):
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in self.parts().items()}, file)
        return file.getvalue()

    def load(self, data, order):
        state = torch.load(io.BytesIO(data), weights_only=True)
        for name in order:
            self.parts()[name].load_state_dict(state[name])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "options", [{"pattern": (1, 1)}, {"pattern": (3, 2), "tie_gates": True, "score": "mean"}], ids=str
)
def test_resumed_training_is_the_same_to_the_bit(optimizer, schedule, options):
    whole = Run(SCHEDULES[schedule], optimizer, seed=0, **options)
    whole.train(range(5))
    data = whole.save()
    whole.train(range(5, 12))
    for order in (("pruner", "model", "optimizer"), ("model", "optimizer", "pruner")):
        resumed = Run(SCHEDULES[schedule], optimizer, seed=1, **options)
        resumed.load(data, order)
        resumed.train(range(5, 12))
        assert resumed.save() == whole.save()
        assert resumed.pruner.finished
        assert 0 < resumed.pruner.sparsity < 1
        assert all(torch.equal(mask, whole.pruner.masks[name]) for name, mask in resumed.pruner.masks.items())


@pytest.mark.parametrize("options", [{"pattern": (3, 1)}, {}, {"balanced": False}], ids=str)
@pytest.mark.parametrize("stop", [2, 6, 10])
def test_a_budget_of_a_layer_goes_on_to_the_bit(options, stop):
    whole = Run(DECAY, "adam", seed=0, split="layer", **options)
    whole.train(range(stop))
    resumed = Run(DECAY, "adam", seed=1, split="layer", **options)
    resumed.load(whole.save(), ("model", "optimizer", "pruner"))
    assert resumed.save() == whole.save()
    for run in (whole, resumed):
        run.train(range(stop, 12))
    assert resumed.save() == whole.save()
    assert resumed.pruner.finished


@pytest.mark.parametrize(
    ("pattern", "order"),
    [
        (Picks(), ("model", "pruner", "optimizer")),
        (Blocks(), ("model", "pruner", "optimizer")),
        (Blocks(), ("pruner", "model", "optimizer")),
    ],
    ids=str,
)
def test_resume_of_a_constant_mask_keeps_it(pattern, order):
    source = Run(OneShot(sparsity=0.6, step=1), "sgd", seed=0, pattern=pattern)
    source.train(range(1))
    whole = Run(ConstantMask(), "sgd", seed=1, pattern=pattern)
    whole.layer.load_state_dict(source.layer.state_dict())
    at_start = whole.save()
    whole.train(range(2))
    half = whole.save()
    whole.train(range(2, 4))
    for data, steps in ((at_start, range(4)), (half, range(2, 4))):
        resumed = Run(ConstantMask(), "sgd", seed=2, pattern=pattern)
        resumed.load(data, order)
        resumed.train(steps)
        assert resumed.save() == whole.save()


@pytest.mark.parametrize("pattern", [Picks(), Blocks()], ids=str)
def test_what_becomes_zero_later_is_not_pruned_on_resume(pattern):
    source = Run(OneShot(sparsity=0.6, step=1), "sgd", seed=0, pattern=pattern)
    source.train(range(1))
    run = Run(ConstantMask(), "sgd", seed=1, pattern=pattern)
    run.layer.load_state_dict(source.layer.state_dict())
    run.train(range(1))
    nn.init.zeros_(run.layer.get_parameter("weight_hh_l0"))
    resumed = Run(ConstantMask(), "sgd", seed=2, pattern=pattern)
    resumed.load(run.save(), ("model", "optimizer", "pruner"))
    resumed.train(range(1, 2))
    assert all(torch.equal(mask, source.pruner.masks[name]) for name, mask in resumed.pruner.masks.items())


def test_loading_applies_masks_at_once_and_replaces_all_of_the_old():
    run = Run(DECAY, "adam", seed=0, pattern=(1, 1))
    fresh = run.pruner.state_dict()
    run.train(range(9))
    other = Run(DECAY, "adam", seed=1, pattern=(1, 1))
    other.pruner.load_state_dict(run.pruner.state_dict())
    assert all(not other.layer.get_parameter(name)[~mask].any() for name, mask in run.pruner.masks.items())
    assert (other.pruner.step_count, other.pruner.sparsity) == (9, run.pruner.sparsity)
    other.pruner.load_state_dict(fresh)
    assert (other.pruner.step_count, other.pruner.sparsity, other.pruner.finished) == (0, 0, False)
    assert all(mask.all() for mask in other.pruner.masks.values())


def test_masks_take_one_bit_for_each_unit():
    pruner = Pruner(nn.GRU(64, 64), DECAY)
    assert pruner.state_dict()["weights"]["weight_hh_l0"]["mask"].nbytes == 3 * 4 * 64 // 8


def test_state_is_a_snapshot():
    run = Run(OneShot(sparsity=0.6, step=1), "adam", seed=0)
    before = copy.deepcopy(run.pruner.state_dict())
    state = run.pruner.state_dict()
    run.train(range(2))
    assert str(state) == str(before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pattern": (8, 1)},
            r"pattern='Picks\(rows=16, .*' in state_dict, but this pruner has 'Blocks\(rows=8, .*'",
        ),
        ({"score": "max"}, "score='l2' in state_dict, but this pruner has 'max'"),
        ({"tie_gates": True}, "tie_gates=False in state_dict, but this pruner has True"),
        ({"balanced": False}, "balanced=True in state_dict, but this pruner has False"),
        ({"split": "layer"}, "split='gate' in state_dict, but this pruner has 'layer'"),
        ({"schedule": OneShot(sparsity=0.6, step=7)}, r"weight_ih_l0 has schedules=.*PolynomialDecay.* has .*OneShot"),
        ({"targets": {"*hh_l1": {"z": None}}}, r"weight_hh_l1 has schedules=.*'None'"),
        ({"targets": {"*hh_l1": None}}, "missing none; unexpected weight_hh_l1"),
        ({"layer": nn.GRU(5, 7)}, "unexpected weight_hh_l1, weight_ih_l1"),
        ({"layer": nn.GRU(5, 7, num_layers=3)}, "missing weight_hh_l2, weight_ih_l2; unexpected none"),
        ({"layer": nn.GRU(6, 7, num_layers=2)}, r"weight_ih_l0 has shape=\[21, 5\] in state_dict, .* \[21, 6\]"),
    ],
)
def test_a_pruner_with_other_settings_refuses(changes, message):
    state = Pruner(nn.GRU(5, 7, num_layers=2), DECAY).state_dict()
    layer, schedule = changes.pop("layer", nn.GRU(5, 7, num_layers=2)), changes.pop("schedule", DECAY)
    with pytest.raises(ValueError, match=message):
        Pruner(layer, schedule, **changes).load_state_dict(state)


def set_in(*path, value):
    def damage(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return damage


def drop(*path):
    def damage(state):
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return damage


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (drop("weights"), ValueError, "state_dict does not fit this pruner: missing weights"),
        (set_in("more", value=1), ValueError, "unexpected more"),
        (set_in("version", value=2), ValueError, "state_dict has version 2, this package reads 1"),
        (set_in("step_count", value=-1), ValueError, "step_count'] must be an integer from 0, got -1"),
        (set_in("step_count", value=1.0), ValueError, "step_count"),
        (set_in("step_count", value=True), ValueError, "step_count"),
        (set_in("settings", value=None), TypeError, "settings must be a mapping, got NoneType"),
        (drop("settings", "score"), ValueError, "settings does not fit this pruner: missing score"),
        (set_in("weights", value=[]), TypeError, "must be a mapping, got list"),
        (set_in("version", value=torch.ones(2)), TypeError, "version'] must be 1, as this pruner has it, got a Tensor"),
        (set_in("step_count", value=torch.ones(2)), ValueError, "step_count"),
        (
            set_in("settings", "pattern", value=torch.tensor([16, 1])),
            TypeError,
            r"settings\['pattern'\] in state_dict must be 'Picks\(.*\)', as this pruner has it, got a Tensor",
        ),
        (set_in("settings", "pattern", value=[[16, 1]]), TypeError, "as this pruner has it, got a list"),
        (set_in("settings", "score", value=torch.tensor(1)), TypeError, r"settings\['score'\] in .* 'l2', .* Tensor"),
        (set_in("settings", "balanced", value=torch.tensor(True)), TypeError, r"settings\['balanced'\] .* True, "),
        (set_in("settings", "tie_gates", value=np.zeros(3)), TypeError, r"settings\['tie_gates'\] .* a ndarray"),
        (
            set_in("weights", "weight_hh_l1", "shape", value=torch.tensor([21, 7])),
            TypeError,
            r"weight_hh_l1\['shape'\] in state_dict must be \[21, 7\], .* got a Tensor",
        ),
        (set_in("weights", "weight_hh_l1", "schedules", value={}), TypeError, r"weight_hh_l1\['schedules'\] .* a dict"),
        (set_in("weights", "weight_hh_l1", "mask", value="11"), ValueError, "weight_hh_l1: expected .*, got str"),
        (
            set_in("weights", "weight_hh_l1", "mask", value=torch.zeros(3, dtype=torch.uint8, device="meta")),
            ValueError,
            r"weight_hh_l1: expected uint8 \[3\] for 21 units, got torch.uint8 \[3\] of .* on meta",
        ),
        (
            set_in("weights", "weight_hh_l1", "mask", value=torch.zeros(3, dtype=torch.uint8).to_sparse()),
            ValueError,
            r"got torch.uint8 \[3\] of layout torch.sparse_coo on cpu",
        ),
        (
            set_in(
                *("weights", "weight_hh_l1", "mask"),
                value=torch.nested.as_nested_tensor([torch.zeros(2), torch.zeros(1)], layout=torch.jagged),
            ),
            ValueError,
            "weight_hh_l1: expected .*, got a nested tensor",
        ),
        (set_in("weights", "weight_hh_l1", value=0), TypeError, "weight_hh_l1 must be a mapping, got int"),
        (drop("weights", "weight_hh_l1", "mask"), ValueError, "weight_hh_l1 does not fit this pruner: missing mask"),
        (
            set_in("weights", "weight_hh_l1", "mask", value=torch.zeros(3)),
            ValueError,
            r"damaged mask for weight_hh_l1: expected uint8 \[3\] for 21 units, got torch.float32 \[3\]",
        ),
        (
            set_in("weights", "weight_hh_l1", "mask", value=torch.tensor([0, 0, 255], dtype=torch.uint8)),
            ValueError,
            "damaged mask for weight_hh_l1: bits are set beyond the 21 units",
        ),
    ],
)
def test_damaged_state_is_refused_whole(damage, error, message):
    run = Run(DECAY, "adam", seed=0)
    run.train(range(3))
    before = run.save()
    state = Run(DECAY, "adam", seed=1).pruner.state_dict()
    damage(state)
    with pytest.raises(
        error, match=message.replace("']", r"'\]") if message.startswith(("step_count'", "version'")) else message
    ):
        run.pruner.load_state_dict(state)
    assert run.save() == before


def test_no_state_at_all_is_refused():
    with pytest.raises(TypeError, match="state_dict must be a mapping, got list"):
        Pruner(nn.GRU(5, 7), DECAY).load_state_dict([])  # type: ignore[arg-type]
