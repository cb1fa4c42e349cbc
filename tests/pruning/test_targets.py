from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from triton_sparse_rnn.names import clean_name, name_matches
from triton_sparse_rnn.pruning import ConstantMask, OneShot, Pruner
from triton_sparse_rnn.pruning.targets import match_weights
from triton_sparse_rnn.sparse.patterns import Blocks
from triton_sparse_rnn.sparse.picks import Picks

HALF, MOST = OneShot(sparsity=0.5, step=1), OneShot(sparsity=0.9, step=1)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.convolution = nn.Conv1d(6, 6, 3)
        self.encoder = nn.GRU(6, 6, num_layers=2, bidirectional=True)
        self.middle = nn.LSTM(6, 8, proj_size=6)
        self.last = nn.RNN(6, 6)
        self.decoder = nn.Linear(6, 10)


def found(model, schedule: Any = HALF, targets: Any = None, include: Any = ()):
    return {weight.name: weight.schedules for weight in match_weights(model, schedule, targets, include)}


def test_recurrent_and_input_weights_are_found_gate_by_gate():
    gates = {name: len(schedules) for name, schedules in found(Model()).items()}
    ends = ("l0", "l0_reverse", "l1", "l1_reverse")
    assert gates == {f"encoder.weight_{kind}_{end}": 3 for end in ends for kind in ("ih", "hh")} | {
        "middle.weight_ih_l0": 4,
        "middle.weight_hh_l0": 4,
        "last.weight_ih_l0": 1,
        "last.weight_hh_l0": 1,
    }


def test_first_matching_glob_wins():
    targets = {"encoder.*_l1": MOST, "encoder.*": None, "*.weight_ih_l0": {"i": None, "g": MOST}}
    with pytest.raises(ValueError, match=r"targets gives schedules to the gates g, i of last\.weight_ih_l0.*are h"):
        found(Model(), HALF, targets)
    schedules = found(Model(), HALF, {"last.*": HALF} | targets)
    assert schedules["encoder.weight_ih_l1"] == (MOST,) * 3
    assert "encoder.weight_ih_l0" not in schedules
    assert "encoder.weight_hh_l1_reverse" not in schedules
    assert schedules["middle.weight_ih_l0"] == (None, HALF, MOST, HALF)
    assert schedules["middle.weight_hh_l0"] == (HALF,) * 4
    assert schedules["last.weight_ih_l0"] == (HALF,)


def test_default_may_be_none():
    assert list(found(Model(), None, {"last.weight_hh*": HALF})) == ["last.weight_hh_l0"]
    assert found(Model(), None, {"last.weight_hh*": {"h": HALF}}) == {"last.weight_hh_l0": (HALF,)}


def test_include_adds_matrices_in_one_gate():
    schedules = found(Model(), HALF, {"decoder.*": MOST}, include=("decoder.*", "*conv*", "middle.weight_h*"))
    added = {name: schedules[name] for name in schedules.keys() - found(Model()).keys()}
    assert added == {"decoder.weight": (MOST,), "convolution.weight": (HALF,), "middle.weight_hr_l0": (HALF,)}
    assert found(Model(), HALF, include=iter(["decoder.*"])).keys() - found(Model()).keys() == {"decoder.weight"}
    (weight,) = match_weights(nn.Conv1d(6, 4, 3), HALF, None, ("weight",))
    assert weight.stacked().shape == (1, 4, 18)
    assert (weight.gates, weight.matrix_shape) == (1, (4, 18))


def test_a_layer_alone_and_wrappers_keep_their_names():
    layer = nn.GRU(3, 4)
    assert list(found(layer)) == ["weight_ih_l0", "weight_hh_l0"]
    assert list(found(layer, None, {"*.weight_hh_l0": HALF})) == ["weight_hh_l0"]
    compiled = torch.compile(nn.Sequential(layer), backend="eager")
    assert isinstance(compiled, nn.Module)
    wrapped = nn.ModuleDict({"module": compiled})
    assert list(found(wrapped)) == ["0.weight_ih_l0", "0.weight_hh_l0"]
    assert list(found(wrapped, None, {"module._orig_mod.0.weight_ih*": HALF})) == ["0.weight_ih_l0"]


def test_names():
    assert clean_name("module.module.a._orig_mod.weight") == "a.weight"
    assert clean_name("my_module.weight") == "my_module.weight"
    assert not name_matches("rnn.weight_hh_l0", "weight_hh_l0")
    assert not name_matches("rnn.weight_hh_l0", "*.WEIGHT_hh_l0")


def test_globs_that_find_nothing_are_errors():
    with pytest.raises(ValueError, match=r"targets has globs that no weight is left for: 'rnn\.\*'"):
        found(Model(), HALF, {"rnn.*": MOST})
    with pytest.raises(ValueError, match=r"no weight is left for: 'encoder\.\*_l1'"):
        found(Model(), HALF, {"encoder.*": MOST, "encoder.*_l1": HALF})
    with pytest.raises(ValueError, match=r"include has '\*\.bias', which matches no parameter of two dimensions"):
        found(Model(), HALF, include=("*.bias",))
    for model, schedule in ((nn.Linear(2, 2), HALF), (nn.GRU(2, 2), None)):
        with pytest.raises(ValueError, match="nothing to prune"):
            found(model, schedule)


def test_wrong_types_are_named():
    model = Model()
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got list"):
        match_weights([], HALF, None, ())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"schedule must be a schedule such as .* got 0\.9"):
        found(model, 0.9)
    with pytest.raises(TypeError, match=r"schedule must be a schedule"):
        found(model, {"r": HALF})
    with pytest.raises(TypeError, match=r"targets\['\*'\] must be a schedule .* got 0.5"):
        found(model, HALF, {"*": {"r": 0.5}})
    with pytest.raises(TypeError, match="targets must map globs"):
        found(model, HALF, [("*", HALF)])
    with pytest.raises(TypeError, match="targets must map globs to schedules, got the key 3"):
        found(model, HALF, {3: None})
    for include in ("decoder.weight", (3,), None, 7):
        with pytest.raises(TypeError, match=r"include must be a sequence of globs, such as \('decoder\.weight',\), "):
            found(model, include=include)
    with pytest.raises(ValueError, match=r"gates r of decoder\.weight, but it has no gates"):
        found(model, HALF, {"decoder.*": {"r": HALF}}, include=("decoder.weight",))


def parametrized():
    layer = nn.GRU(3, 4)
    nn.utils.parametrize.register_parametrization(layer, "weight_hh_l0", nn.Identity())
    return layer


def weight_normed():
    layer = nn.GRU(3, 4)
    nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    return layer


def pruned_by_torch():
    layer = nn.GRU(3, 4)
    prune.random_unstructured(layer, "weight_hh_l0", 0.5)
    return layer


def frozen():
    layer = nn.GRU(3, 4)
    layer.weight_hh_l0.requires_grad_(False)
    return layer


def subclassed():
    class Sharded(nn.Parameter):
        pass

    layer = nn.GRU(3, 4)
    layer.weight_hh_l0 = Sharded(torch.zeros(12, 4))
    return layer


def flat_shard():
    layer = nn.GRU(3, 4)
    layer.weight_hh_l0 = nn.Parameter(torch.zeros(17))
    return layer


def complex_valued():
    layer = nn.GRU(3, 4)
    layer.weight_hh_l0 = nn.Parameter(torch.zeros(12, 4, dtype=torch.complex64))
    return layer


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (parametrized, ValueError, "is not a plain parameter: it is parametrized"),
        (weight_normed, ValueError, "is not a plain parameter"),
        (pruned_by_torch, ValueError, "is not a plain parameter"),
        (frozen, ValueError, "is frozen"),
        (subclassed, TypeError, r"must be a plain nn\.Parameter, got a Sharded"),
        (flat_shard, ValueError, r"must have 12 rows, got shape \(17,\)"),
        (complex_valued, TypeError, r"floating-point parameter, got torch\.complex64"),
    ],
)
def test_weights_that_cannot_be_pruned_are_refused_and_can_be_left_out(build, error, message):
    layer = build()
    with pytest.raises(error, match=f"^weight_hh_l0 .*{message}.*; targets={{'weight_hh_l0': None}} leaves it out"):
        Pruner(layer, HALF)
    assert [weight.name for weight in Pruner(layer, HALF, targets={"weight_hh_l0": None}).weights] == ["weight_ih_l0"]


def test_parametrized_matrix_is_not_found_by_its_original():
    model = nn.Sequential(nn.Linear(3, 4))
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    with pytest.raises(ValueError, match="is parametrized"):
        Pruner(model, HALF, include=("0.*",))


def test_tied_weights_are_refused_or_pruned_once():
    model = nn.ModuleList([nn.RNN(4, 4), nn.RNN(4, 4)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    with pytest.raises(ValueError, match=r"0\.weight_hh_l0 and 1\.weight_hh_l0 are one tied parameter"):
        Pruner(model, HALF)
    pruner = Pruner(model, HALF, targets={"1.weight_hh_l0": None})
    assert [weight.name for weight in pruner.weights] == ["0.weight_ih_l0", "0.weight_hh_l0", "1.weight_ih_l0"]


def test_a_module_used_twice_is_one():
    layer = nn.RNN(4, 4)
    assert len(found(nn.ModuleList([layer, layer]))) == 2


def test_names_that_collide_without_prefixes_are_refused():
    model = nn.Module()
    model.add_module("module", nn.RNN(4, 4))
    model.add_module("_orig_mod", nn.RNN(4, 4))
    with pytest.raises(ValueError, match=r"both called weight_ih_l0"):
        Pruner(model, HALF)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (
            lambda: nn.GRU(1, 16),
            {},
            r"weight_ih_l0 .* in gates r, z, n: .* there is, 1 picked unit of 16x1 in 32 in each gate; .*",
        ),
        (
            lambda: nn.GRU(1, 16),
            {"pattern": (16, 1)},
            r"weight_ih_l0 .* in gates r, z, n: .* there is, 1 block of 16x1 in each gate; .*",
        ),
        (
            lambda: nn.GRU(1, 40),
            {"pattern": (16, 1), "balanced": True},
            r"weight_ih_l0 .* r, z, n: .* 1 block of 16x1 in each unit group; .*",
        ),
        (lambda: nn.LSTM(8, 8), {"targets": {"*ih*": {"f": OneShot(sparsity=0.99, step=1)}}}, r"weight_ih_l0 .* f: .*"),
        (
            lambda: nn.ModuleList([nn.RNN(9, 9), nn.Linear(4, 3)]),
            {"include": ("1.weight",), "pattern": (3, 2)},
            r"1\.weight will be pruned to nothing: the final sparsity .*, 2 blocks of 3x2 in each gate; .*",
        ),
    ],
    ids=["one input", "one input, blocks", "balanced", "one gate", "included"],
)
def test_weights_that_will_be_pruned_to_nothing_are_warned_of(build, options, message):
    with pytest.warns(UserWarning, match=f"^{message}targets={{'[1a-z_.]*weight[a-z0_]*': None}}$") as caught:
        Pruner(build(), MOST, **options)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("pattern", [Picks(), Blocks()], ids=str)
@pytest.mark.parametrize("options", [{}, {"balanced": True}, {"targets": {"*ih*": None}}])
def test_weights_of_which_a_unit_is_left_are_not_warned_of(options, pattern):
    Pruner(nn.GRU(1 if "targets" in options else 6, 16), MOST, pattern=pattern, **options)  # round(0.9 * 6) = 5


def test_options_that_exclude_each_other():
    with pytest.raises(ValueError, match=r"balanced=True needs a schedule by rank.* ConstantMask"):
        Pruner(nn.GRU(3, 4), ConstantMask(), balanced=True)
    with pytest.raises(ValueError, match=r"tie_gates=True .* targets gives weight_hh_l0 several"):
        Pruner(nn.GRU(3, 4), HALF, tie_gates=True, targets={"*hh*": {"r": MOST}})
    with pytest.raises(TypeError, match="balanced must be a bool, got 1"):
        Pruner(nn.GRU(3, 4), HALF, balanced=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="score must be one of"):
        Pruner(nn.GRU(3, 4), HALF, score="min")
    with pytest.raises(TypeError, match="pattern must be two integers"):
        Pruner(nn.GRU(3, 4), HALF, pattern=16)  # type: ignore[arg-type]
