"""One budget for a layer: what a pruner does with split="layer". What gates do apart is in test_pruner.py."""

import dataclasses
import itertools
from collections import Counter

import pytest
import torch
from pruner_training import attached, gru, masked_everywhere, train
from torch import nn

from triton_sparse_rnn.pruning import ConstantMask, OneShot, PolynomialDecay, Pruner, Schedule, ThresholdRamp, forecast
from triton_sparse_rnn.sparse.patterns import Blocks
from triton_sparse_rnn.sparse.picks import Picks

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # of nn.LSTM

DECAY = PolynomialDecay(final_sparsity=0.8, begin_step=1, end_step=7, frequency=2)
HALF, MOST = OneShot(sparsity=0.5, step=1), OneShot(sparsity=0.9, step=2)
PATTERNS = (Picks(4, 8), Picks(5, 16, 2), Blocks(4, 1), Blocks(5, 3), Blocks(1, 1))
LAYERS = {
    "GRU": lambda **options: nn.GRU(19, 12, **options),
    "LSTM": lambda **options: nn.LSTM(19, 12, proj_size=7, **options),
    "RNN": lambda **options: nn.RNN(19, 12, **options),
    "two ways, two layers": lambda **options: nn.GRU(19, 12, num_layers=2, bidirectional=True, **options),
}


def uneven(layer):
    """Make gates and weights differ, so that a shared budget does not fall evenly."""
    with torch.no_grad():
        for index, (name, weight) in enumerate(layer.named_parameters()):
            if "weight" in name and "hr" not in name:
                weight[: layer.hidden_size] *= 0.05 if index % 2 else 4
                weight[-layer.hidden_size // 2 :] *= 3
    return layer


def kept_units(pruner):
    """By weight, how many units each gate keeps, and how many it has."""
    found = {}
    for weight in pruner.weights:
        units = pruner.pattern.kept(weight.stacked(pruner.masks[weight.name])).flatten(1)
        found[weight.name] = units.sum(1).tolist(), units.shape[1]
    return found


def by_layer(pruner):
    """By layer and direction, how many units are kept, and how many there are."""
    kept, units = Counter(), Counter()
    for name, (counts, size) in kept_units(pruner).items():
        layer = name.replace("_ih_", "_").replace("_hh_", "_")
        kept[layer] += sum(counts)
        units[layer] += size * len(counts)
    return {layer: (kept[layer], units[layer]) for layer in units}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"balanced": True}, {"balanced": False}, {"balanced": False, "tie_gates": True}], ids=str
)
def test_a_layer_is_as_sparse_as_scheduled_and_no_gate_dies(kind, pattern, options):
    layer, masks, totals = uneven(LAYERS[kind]()), [], []
    pruner, optimizer = attached(layer, DECAY, pattern=pattern, split="layer", **options)
    predicted = forecast(layer, pruner)

    def after():
        masks.append(pruner.masks)
        totals.append(by_layer(pruner))

    train(layer, optimizer, 9, after)
    assert pruner.finished
    assert masked_everywhere(pruner, optimizer)
    for earlier, later in itertools.pairwise(masks):
        assert not any((later[name] & ~mask).any() for name, mask in earlier.items())
    gates = pruner.weights[0].gates
    together = gates if pruner.tie_gates else 1
    if pruner.balanced and isinstance(pattern, Blocks):
        together *= -(-12 // pattern.rows)
    for step in (1, 3, 5, 7, 9):
        for kept, units in totals[step - 1].values():
            assert kept == units - together * round(DECAY.sparsity_at(step) * units / together)
    for name, (counts, size) in kept_units(pruner).items():
        assert min(counts) >= 0.2 * size / 4, name
    shares = {count / size for counts, size in kept_units(pruner).values() for count in counts}
    assert len(shares) > 1 or together > 1 or max(size for _, size in kept_units(pruner).values()) < 20
    stored = sum(sum(counts) for counts, _ in kept_units(pruner).values())
    assert predicted.stored_units == stored
    assert not any("hr" in name for name in pruner.masks)
    weights = sum(weight.parameter.numel() for weight in pruner.weights)
    assert abs(pruner.sparsity - 0.8) * weights <= (gates * len(pruner.weights) + together) * pattern.products


def prune_at_once(layer, schedule=HALF, **options):
    """Prune without training; return the pruner."""
    pruner, optimizer = attached(layer, schedule, torch.optim.SGD(layer.parameters(), lr=0.0), split="layer", **options)
    train(layer, optimizer, 3)
    return pruner


def test_single_weights_are_those_that_are_largest_beside_the_root_mean_square_of_their_own():
    layer = gru(23, 40)
    with torch.no_grad():
        layer.weight_ih_l0[:40] *= 2
        layer.weight_hh_l0[40:80] *= 0.7
    weights = [layer.get_parameter(f"weight_{kind}_l0").detach().clone() for kind in ("ih", "hh")]
    relative = [(weight / weight.square().mean().sqrt()).abs() for weight in weights]
    wanted = torch.cat([each.flatten() for each in relative]).sort().values[-3 * 40 * 63 // 2]
    pruner = prune_at_once(layer, pattern=(1, 1), score="max")
    for mask, each in zip(pruner.masks.values(), relative, strict=True):
        assert (mask == (each >= wanted)).float().mean() > 0.999
    assert pruner.sparsity == 0.5
    assert len(set(pruner.sparsities.values())) == 2


def test_a_gate_of_tiny_weights_keeps_a_quarter_of_an_even_share_and_others_take_the_rest():
    layer = gru(40, 40)
    with torch.no_grad():
        layer.weight_hh_l0.view(3, 40, 40)[1] *= 1e-6
        layer.weight_ih_l0 *= 1000  # all of it, so that it is nothing special beside its own size
    kept = kept_units(prune_at_once(layer, OneShot(sparsity=0.9, step=1), pattern=(1, 1)))
    (ih, size), (hh, _) = kept["weight_ih_l0"], kept["weight_hh_l0"]
    assert hh[1] == 0.025 * size
    assert sum(ih) + sum(hh) == 0.6 * size
    assert all(hh[1] < count < 0.25 * size for count in (*ih, hh[0], hh[2]))


@pytest.mark.parametrize("pattern", [Picks(4, 8), Blocks(4, 1)], ids=str)
def test_layers_directions_and_other_parameters_have_budgets_of_their_own(pattern):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.input_size = 8
            self.rnn = uneven(gru(8, 16, num_layers=2, bidirectional=True))
            self.head = nn.Linear(32, 8)

        def forward(self, x):
            return (self.head(self.rnn(x)[0]),)

    model = Model()
    with torch.no_grad():
        model.rnn.weight_hh_l1_reverse *= 1e-3
        model.head.weight *= 1e3
    pruner = prune_at_once(model, include=("head.weight",), pattern=pattern)
    assert pruner.sparsities["head.weight"] == 0.5
    totals = by_layer(pruner)
    assert set(totals) == {
        "rnn.weight_l0",
        "rnn.weight_l0_reverse",
        "rnn.weight_l1",
        "rnn.weight_l1_reverse",
        "head.weight",
    }
    assert all(2 * kept == units for kept, units in totals.values())


def test_schedules_and_dense_weights_part_a_budget():
    layer = uneven(gru(8, 16))
    targets = {"*hh*": {"z": MOST, "n": None}, "*ih*": {"r": None, "z": MOST}}
    kept = kept_units(prune_at_once(layer, targets=targets, pattern=(4, 1)))
    (ih, ih_units), (hh, hh_units) = kept["weight_ih_l0"], kept["weight_hh_l0"]
    assert (hh[2], ih[0]) == (hh_units, ih_units)
    assert hh[0] + ih[2] == (hh_units + ih_units) / 2
    assert hh[1] + ih[1] == round(0.1 * (hh_units + ih_units))
    one = {name: dataclasses.replace(HALF) for name in ("*hh*", "*ih*")}  # equal ones are one
    alike, apart = (prune_at_once(uneven(gru(8, 16)), targets=each, pattern=(4, 1)) for each in (one, {"*hh*": MOST}))
    assert alike.sparsity == 0.5
    assert alike.sparsities["weight_ih_l0"] != 0.5
    assert apart.sparsities["weight_ih_l0"] == 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_other_dtypes_and_faults_in_weights(dtype, pattern):
    layer = uneven(gru(9, 12, dtype=dtype))
    nan, inf = (0, 3), (13, 4)
    with torch.no_grad():
        layer.weight_hh_l0[nan], layer.weight_hh_l0[inf] = torch.nan, torch.inf
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    pruner = Pruner(layer, HALF, pattern=pattern, balanced=False, split="layer")
    pruner.step(optimizer)
    assert all(kept == units - round(units / 2) for kept, units in by_layer(pruner).values())
    assert pruner.masks["weight_hh_l0"][nan]
    assert pruner.masks["weight_hh_l0"][inf]
    assert min(min(counts) / size for counts, size in kept_units(pruner).values()) >= 1 / 8


def test_a_weight_of_zeros_keeps_its_floor():
    layer = gru(8, 16)
    nn.init.zeros_(layer.weight_ih_l0)
    kept = kept_units(prune_at_once(layer, pattern=(4, 1)))
    assert kept["weight_ih_l0"] == ([4, 4, 4], 32)
    assert sum(kept["weight_hh_l0"][0]) == (3 * 96) // 2 - 12


def test_few_units_are_not_pruned_to_nothing_and_that_is_said_where_it_costs_sparsity():
    assert (
        min(kept_units(prune_at_once(gru(4, 16), OneShot(sparsity=0.9, step=1), pattern=Picks()))["weight_ih_l0"][0])
        == 1
    )
    with pytest.warns(
        UserWarning,
        match="^weight_ih_l0, weight_hh_l0 will be less sparse than the schedule says, which would leave "
        r"1 picked unit of 16x1 in 32: 6 picked units of 16x1 in 32 are kept, so that no gate loses all",
    ):
        pruner = prune_at_once(gru(4, 16), OneShot(sparsity=0.99, step=1), pattern=Picks())
    assert kept_units(pruner) == {"weight_ih_l0": ([1, 1, 1], 4), "weight_hh_l0": ([1, 1, 1], 16)}
    with pytest.warns(UserWarning, match="would leave 4 blocks of 4x1: 24 blocks of 4x1 are kept"):
        prune_at_once(gru(4, 16), OneShot(sparsity=0.99, step=1), pattern=Blocks(4, 1), balanced=True)


@dataclasses.dataclass(frozen=True)
class Jumps(Schedule):
    """By rank, from step to step, and back once."""

    @property
    def last_step(self):
        return 3

    def updates_at(self, step):
        return step in (1, 2, 3)

    def sparsity_at(self, step):
        return {1: 0.6, 2: 0.3}.get(step, 0.7)


def test_a_schedule_of_your_own_that_goes_back_brings_nothing_back():
    layer, masks = uneven(gru(8, 16)), []
    pruner, optimizer = attached(layer, Jumps(), pattern=Picks(4, 8), split="layer")
    train(layer, optimizer, 3, after=lambda: masks.append(pruner.masks))
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    assert not any((masks[2][name] & ~masks[1][name]).any() for name in masks[0])
    assert pruner.sparsity == pytest.approx(0.7, abs=0.01)


def test_schedules_that_do_not_choose_how_many_are_refused():
    ramp = ThresholdRamp(q=0.1, begin_step=0, ramp_step=1, end_step=2)
    for schedule in (ramp, ConstantMask()):
        name = type(schedule).__name__
        with pytest.raises(
            ValueError, match=rf"split='layer' needs a schedule by rank, .*: a {name} \(for weight_ih_l0\)"
        ):
            Pruner(gru(3, 4), schedule, split="layer")
    with pytest.raises(ValueError, match=r"split='layer' .* ThresholdRamp \(for weight_hh_l0\)"):
        Pruner(gru(3, 4), HALF, split="layer", targets={"*hh*": {"n": ramp}})
    with pytest.raises(ValueError, match="split must be one of 'gate', 'layer', got 'row'"):
        Pruner(gru(3, 4), HALF, split="row")
    assert Pruner(gru(3, 4), ramp).split == "gate"
