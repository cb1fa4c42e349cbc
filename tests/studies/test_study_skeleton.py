"""What all studies do alike, on one whose runs are numbers."""

import dataclasses
import importlib
from typing import ClassVar

import pytest
import torch
from torch import nn

from studies.accuracy.study import ACCURACY
from studies.denoising.study import DENOISING
from studies.gate_gradients.study import GATE_GRADIENTS
from studies.runs.command_line import INTERRUPTED, main
from studies.runs.records import Key, Records, key_of
from studies.runs.study import Place, Study, keep_weights, weights_path
from studies.tasks.task import MissingDataError

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    seeds: tuple[int, ...] = (0,)
    rate: float = 1.0


class Sums:
    name: ClassVar = "sums"
    steps: ClassVar = 3


ALONE, FIRST, SECOND, THIRD = Row("as it came"), Row("dense", (0, 1)), Row("10 %"), Row("20 %")


def load(name, place):
    if name == "products":
        raise MissingDataError("products are missing; pip install products")
    return Sums()


def train(task, row, key, place, on_step):
    for step in range(key.steps):
        on_step(float(step))
    keep_weights(nn.Linear(2, 3), place.models, key)
    return {"value": 10 * key.seed + key.steps}


STUDY = Study(
    name="toy_study",
    title="Numbers.",
    records=Records("studies.toy_study", frozenset({"settings", "value"}), times=frozenset({"us"})),
    selections={"all": (ALONE, FIRST, SECOND, THIRD), "some": (THIRD,)},
    always=(ALONE, FIRST),
    untrained=("as it came",),
    settings=lambda task, row, steps: {"rate": row.rate},
    train=train,
    outcome=lambda task, run: f"value {run['value']}",
    tables=lambda lines: f"{len(lines.runs)} runs, {len(lines.times)} times",
    plot=lambda lines, folder: [folder / "plot.png"],
    time=lambda lines, models: [key._asdict() | {"us": 1.0} for key in lines.runs],
    keeps_models=True,
    tasks=("sums", "products"),
    load=load,
)
ORDER = [("as it came", 0, 0), ("dense", 0, 3), ("10 %", 0, 3), ("20 %", 0, 3), ("dense", 1, 3)]


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "runs.jsonl", tmp_path / "models")


def options(place):
    return ["--out", str(place.file), "--models", str(place.models)]


def names(place):
    return [key_of(run)[1:] for run in STUDY.records.read(place.file)]


def test_an_interrupted_run_goes_on_and_is_timed_and_shown(place, capsys):
    trained = []

    def interrupted(*arguments):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(arguments)
        assert torch.get_num_threads() == 1
        return train(*arguments)

    torch.set_num_threads(2)
    command = ["run", "sums", *options(place)]
    assert main(dataclasses.replace(STUDY, train=interrupted), command) == INTERRUPTED
    assert f"the same command goes on after the last finished run in {place.file}" in capsys.readouterr().err
    assert torch.get_num_threads() == 2
    assert names(place) == ORDER[:2]
    for _ in range(2):
        assert main(STUDY, command) == 0
        assert names(place) == ORDER
    output = capsys.readouterr().out
    assert "sums, dense, seed 1: value 13, 0 s" in output
    assert output.count("seed 1:") == 1
    runs = STUDY.records.read(place.file)
    assert all(run["settings"] == {"rate": 1.0} and run["threads"] == 1 and run["versions"] for run in runs)

    assert main(STUDY, ["time", str(place.file), *options(place)]) == 0
    assert main(STUDY, command) == 0  # times in the file are no runs
    capsys.readouterr()
    assert main(STUDY, ["table", str(place.file)]) == 0
    assert capsys.readouterr().out == "5 runs, 5 times\n"
    plots = place.models.parent / "new" / "plots"
    assert main(STUDY, ["plot", str(place.file), "--out", str(plots)]) == 0
    assert capsys.readouterr().out == f"{plots / 'plot.png'}\n"
    assert plots.is_dir()


def test_rows_are_chosen_and_those_that_others_need_run_always():
    assert STUDY.rows() == [ALONE, FIRST, SECOND, THIRD]
    assert STUDY.rows("some") == STUDY.rows("all", ["20 %"]) == [ALONE, FIRST, THIRD]


def test_seeds_and_steps_of_the_command_line(place):
    assert main(STUDY, ["run", "sums", "--rows", "some", "--steps", "7", "--seed", "5", *options(place)]) == 0
    assert names(place) == [("as it came", 0, 0), ("dense", 5, 7), ("20 %", 5, 7)]
    assert weights_path(place.models, Key("sums", "20 %", 5, 7)).name == "sums-20-5-7.safetensors"


def test_other_settings_and_lost_weights_are_refused(place, quiet):
    STUDY.run_missing(Sums(), [FIRST], place, console=quiet)
    with pytest.raises(ValueError, match="'dense' with other settings; name another file"):
        STUDY.run_missing(Sums(), [dataclasses.replace(FIRST, rate=2.0)], place, console=quiet)
    weights_path(place.models, Key("sums", "dense", 1, 3)).unlink()
    with pytest.raises(ValueError, match="lacks the weights of 'dense', seed 1"):
        STUDY.run_missing(Sums(), [FIRST], place, console=quiet)
    STUDY.run_missing(Sums(), [FIRST], place, steps=4, console=quiet)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["run", "products"], "studies.toy_study: products are missing; pip install products\n"),
        (["table", __file__], "line 1: not of studies.toy_study; name another file\n"),
        (["plot", "nothing", "--out", "{}"], "No such file or directory: 'nothing'\n"),
    ],
)
def test_what_cannot_be_done_is_said(command, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(STUDY, [word.format(tmp_path) for word in command]) == 2
    assert capsys.readouterr().err.endswith(message)
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_does_not_go_on_does_not_promise_it(place, capsys):
    def interrupted(lines):
        raise KeyboardInterrupt

    STUDY.records.append(place.file, Key("sums", "dense", 0, 3)._asdict() | {"settings": {}, "value": 1})
    assert main(dataclasses.replace(STUDY, tables=interrupted), ["table", str(place.file)]) == INTERRUPTED
    assert capsys.readouterr().err == "Stopped\n"


@pytest.mark.parametrize(
    "words", ["--steps 0", "--steps -1", "--steps x", "nonsense", "--rows few", "--row x", "--seed a"]
)
def test_wrong_arguments_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        main(STUDY, ["run", *words.split()])
    assert "usage: python -m studies.toy_study run" in capsys.readouterr().err


def test_a_study_that_times_nothing_has_no_such_command(capsys):
    with pytest.raises(SystemExit):
        main(dataclasses.replace(STUDY, time=None), ["time", "runs.jsonl"])
    assert "invalid choice: 'time'" in capsys.readouterr().err


@pytest.mark.parametrize("study", [ACCURACY, DENOISING, GATE_GRADIENTS], ids=lambda study: study.name)
def test_every_study_has_a_program_and_rows_with_names_of_their_own(study):
    assert importlib.import_module(f"studies.{study.name}.__main__").main is main
    rows = study.rows()
    assert len({row.name for row in rows}) == len(rows)
    assert {row.name for row in study.always} >= {*study.untrained}
    assert all(row in rows for chosen in study.selections.values() for row in chosen)
