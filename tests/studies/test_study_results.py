"""What tables and pictures make of runs: those that are committed, whole and in part."""

import functools
from pathlib import Path

import pytest

from studies.accuracy.plots import plot_all as plot_accuracy
from studies.accuracy.study import ACCURACY
from studies.accuracy.summary import models_of
from studies.denoising.plots import plot_quality
from studies.denoising.rows import ROWS
from studies.denoising.study import DENOISING
from studies.denoising.table import tables as denoising_tables
from studies.gate_gradients import plots as gate_plots
from studies.gate_gradients.study import GATE_GRADIENTS
from studies.gate_gradients.summary import rows_of
from studies.runs.records import Key, Lines

RESULTS = Path(__file__).resolve().parents[2] / "studies" / "results"
COMMITTED = {
    "accuracy": (ACCURACY, ["accuracy.jsonl"], "accuracy.md"),
    "accuracy-short": (ACCURACY, ["accuracy-short.jsonl", "accuracy-short-times.jsonl"], "accuracy-short.md"),
    "denoising": (DENOISING, ["denoising.jsonl"], "denoising.md"),
    "denoising-blocks": (DENOISING, ["denoising-blocks.jsonl"], "denoising.md"),
    "gate_gradients": (GATE_GRADIENTS, ["gate-gradients.jsonl"], "lstm-training.md"),
}


@functools.cache
def committed(name):
    study, files, _ = COMMITTED[name]
    return study.records.read_files(RESULTS / file for file in files)


def part(name, chosen):
    """What is committed of the runs that are chosen by their names."""
    return Lines(*({key: line for key, line in lines.items() if chosen(key)} for lines in committed(name)))


@pytest.mark.parametrize("name", COMMITTED)
def test_what_is_committed_gives_the_page_that_is_committed(name):
    study, _, page = COMMITTED[name]
    lines = study.tables(committed(name)).splitlines()
    page = (RESULTS / page).read_text(encoding="utf-8").splitlines()
    told = [line for line in lines if line.startswith("|") or " minutes on " in line]
    assert [line for line in told if line not in page] == []
    assert len(lines) > 20


def test_models_in_their_order_and_without_a_difference_where_the_dense_run_is_missing():
    chosen = {("characters", 800)}
    lines = part(
        "accuracy-short", lambda key: (key.task, key.steps) in chosen and not (key.row == "dense" and key.seed == 0)
    )
    (section,) = models_of(lines)
    models = {model.name: model for model in section.models}
    assert [*models][:4] == ["dense", "dense, float16", "small dense", "90 % in 16x1 blocks"]
    assert models["score max"].row.family == "masks"
    assert {model.split for model in section.models} == {"validation"}
    pruned, alone = models["90 % in 16x1 blocks"].worse, models["tie_gates"].worse
    assert pruned is not None
    assert (pruned.seeds, alone) == (2, None)  # of seeds 1 and 2; of seed 0


def test_rows_in_their_order_and_without_a_difference_where_the_dense_run_is_missing():
    lines = part("gate_gradients", lambda key: key.task == "characters" and not (key.row == "dense" and key.seed == 0))
    tried = Key("characters", "tried once", 1, 500)
    lines.runs[tried] = next(run for key, run in lines.runs.items() if key.seed == 1) | tried._asdict()
    (section,) = rows_of(lines)
    rows = {row.name: row.minus_dense["bits_per_character"] for row in section.models}
    assert [*rows][:2] == ["dense", "deterministic, 80 %"]
    assert [*rows][-1] == "tried once"
    assert section.models[-1].family == "other"
    mean, alone = rows["deterministic, 80 %"], rows["stochastic, 95 %"]
    assert mean is not None
    assert (mean.seeds, alone) == (2, None)


def are_pictures(paths):
    return all(path.read_bytes()[:4] == b"\x89PNG" for path in paths)


def test_pictures_of_accuracy(tmp_path):
    assert plot_accuracy(committed("accuracy"), tmp_path) == [
        tmp_path / f"accuracy-{name}.png" for name in ("time", "width")
    ]
    lines = part("accuracy-short", lambda key: key.task == "characters")
    assert plot_accuracy(lines, tmp_path) == [tmp_path / "accuracy-schedule-characters.png"]
    assert are_pictures(tmp_path.iterdir())


def test_pictures_of_gate_gradients(tmp_path, monkeypatch):
    lines = part("gate_gradients", lambda key: key.task == "characters")
    paths = gate_plots.plot_all(lines, tmp_path)
    assert paths == [tmp_path / f"gate-gradients-{name}.png" for name in ("trade-off", "characters")]
    assert are_pictures(paths)
    for name in ("plot_distribution", "plot_side_by_side"):
        monkeypatch.setattr(gate_plots, name, lambda *arguments: None)
    dense = {key: run for key, run in lines.runs.items() if key.row == "dense"}
    shorter = {key._replace(steps=20): run | {"steps": 20} for key, run in dense.items()}
    names = [path.name for path in gate_plots.plot_all(Lines(dense | shorter, {}), tmp_path)]
    assert names == [f"gate-gradients-{name}.png" for name in ("trade-off", "characters-20", "characters-500")]


@pytest.mark.parametrize("rows", [None, ("noisy",)])
def test_pictures_of_denoising_from_what_is_there_so_far(tmp_path, rows):
    lines = part("denoising-blocks", lambda key: rows is None or key.row in rows)
    if rows is None:
        pruned = lines.runs[Key("denoising", "90 % in 16x1 blocks", 0, 800)]
        lines.runs.update({Key("denoising", row.name, 0, 800): pruned for row in ROWS if row.sparsity})
    paths = plot_quality(lines, tmp_path)
    assert paths == [tmp_path / "denoising.png"]
    assert are_pictures(paths)


def test_denoisers_trained_for_different_times_are_not_mixed():
    runs, times = committed("denoising-blocks")
    with pytest.raises(ValueError, match="different numbers of steps"):
        denoising_tables(Lines(runs | {Key("denoising", "95 %", 0, 20): {}}, times))
