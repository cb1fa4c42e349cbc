"""The rule for what pruning costs, on errors that follow it and on one that does not."""

import pytest

from studies.accuracy.rows import DENSE, IN_BLOCKS, PRUNED, SELF_TAUGHT, SMALL
from studies.accuracy.rule import Size, power, rule_of, told, worth
from studies.accuracy.summary import models_of
from studies.runs.records import Key, Lines

B, WORTH = 0.2, 2.5


def error_of(parameters, scale=1.0):
    return 3.0 * (scale * parameters) ** -B


def a_run(task, row, parameters, error):
    metric = {"characters": "bits_per_character", "pronunciation": "phoneme_error_percent", "sounds": "error_percent"}
    others = {"word_error_percent": 1.0, "nats_per_word": 1.0, "nats": 1.0}
    quality = {split: {metric[task]: value} | others for split, value in (("validation", 9.0), ("test", error))}
    model = {"weight_dtype": "float32", "bytes": 1, "quality": quality}
    facts = {"hidden_size": 9, "sparsity": 0.9, "parameters": parameters, "seconds": 1.0, "models": [model]}
    return Key(task, row, 0, 10)._asdict() | facts


def lines(*runs):
    return Lines({Key(run["task"], run["row"], run["seed"], run["steps"]): run for run in runs}, {})


def test_the_rule_undoes_what_worth_found():
    dense, small = Size(1000, error_of(1000)), Size(150, error_of(150))
    assert power(dense, small) == pytest.approx(B)
    pruned = Size(120, error_of(120, WORTH))
    assert worth(dense, small, pruned) == pytest.approx(WORTH)
    assert told(dense, small, 120, WORTH) == pytest.approx(pruned.error)
    assert told(dense, small, 990, WORTH) == dense.error


def test_what_was_fitted_is_left_out_and_the_rest_is_told():
    runs = []
    for task, scale in (("characters", 1.0), ("pronunciation", 0.1)):
        runs += [
            a_run(task, DENSE.name, 1000, scale * error_of(1000)),
            a_run(task, SMALL.name, 150, scale * error_of(150)),
            a_run(task, PRUNED.name, 150, scale * error_of(150, WORTH)),
            a_run(task, "95 % in picks", 100, scale * error_of(100, WORTH)),
            a_run(task, "90 % in picks at once", 150, 9.0),
            a_run(task, "2 times as wide, 90 % in picks", 300, 9.0),
        ]
    runs.append(a_run("pronunciation", IN_BLOCKS.name, 150, 0.1 * error_of(150)))
    text = rule_of(models_of(lines(*runs)))
    assert "2.50 (picks, by characters, 10 steps), 1.00 (16x1 blocks, by pronunciation, 10 steps)" in text
    cells = [line.split(" | ") for line in text.splitlines() if line.startswith("|")][2:]
    assert [(task[2:], model) for task, model, *_ in cells] == [
        ("characters, 10 steps", "95 % in picks"),
        ("pronunciation, 10 steps", PRUNED.name),
        ("pronunciation, 10 steps", "95 % in picks"),
    ]
    assert all(error.rstrip(" |") in ("+0.0", "-0.0") for *_, error in cells)


def test_errors_of_the_rule_are_told():
    runs = [
        a_run(task, row.name, parameters, error)
        for task in ("characters", "pronunciation")
        for row, parameters, error in ((DENSE, 1000, 1.0), (SMALL, 100, 2.0), (PRUNED, 100, 1.5))
    ]
    runs[-1]["models"][0]["quality"]["test"]["phoneme_error_percent"] = 1.75
    assert rule_of(models_of(lines(*runs))).splitlines()[-1].endswith("| +50.0 | +75.0 | -25.0 |")


def test_no_rule_without_a_small_model():
    runs = [a_run("characters", row.name, 100, 1.0) for row in (DENSE, PRUNED, SELF_TAUGHT)]
    assert rule_of(models_of(lines(*runs))) == ""
