import dataclasses
import importlib.metadata
import importlib.util
import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from triton_sparse_rnn import cli
from triton_sparse_rnn.demo import run, settings

TINY = (
    "input_size=7, hidden_size=20, batch_size=3, window=11, steps=60, prune_every=5, held_out=900, generated=20, "
    "checkpoint_every=1000"
)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("Was du ererbt von deinen Vätern hast, erwirb es, um es zu besitzen.\n" * 200, encoding="utf-8")
    return path


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The single line on stderr."""
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("triton-sparse-rnn: ")
    return captured.err.removeprefix("triton-sparse-rnn: ").strip()


def test_version_and_help(capsys: pytest.CaptureFixture[str]):
    for argument, shown in (("--version", importlib.metadata.version("triton-sparse-rnn")), ("--help", "doctor")):
        with pytest.raises(SystemExit) as end:
            cli.main([argument])
        assert end.value.code == 0
        assert shown in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["report"]])
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert "usage: triton-sparse-rnn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "word", "message"),
    [
        ("--seed", "abc", "must be a whole number, 0 or more, got 'abc'"),
        ("--seed", "-1", "must be a whole number, 0 or more, got '-1'"),
        ("--seed", str(2**63), f"must be below 2**63, got {2**63}"),
        ("--threads", "1.5", "must be a whole number, 1 or more, got '1.5'"),
        ("--threads", "0", "must be a whole number, 1 or more, got '0'"),
    ],
)
def test_wrong_numbers(option: str, word: str, message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main(["demo", f"{option}={word}"])
    assert capsys.readouterr().err.endswith(f"error: argument {option}: {message}\n")


def test_doctor(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["doctor"]) == 0
    output = capsys.readouterr().out
    for word in ("python", "torch", "numba", "triton", "reference  runs here"):
        assert word in output


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save(nn.GRU(3, 5).state_dict(), tmp_path / "model.pt")
    assert cli.main(["report", str(tmp_path / "model.pt")]) == 0
    assert "weight_hh_l0" in capsys.readouterr().out


@pytest.mark.slow("programs")
def test_doctor_and_report_need_no_extra(tmp_path: Path):
    torch.save(nn.GRU(3, 5).state_dict(), tmp_path / "model.pt")
    program = (
        "import sys\nsys.modules['rich'] = sys.modules['matplotlib'] = None\n"
        "from triton_sparse_rnn.cli import main\n"
        f"sys.exit(main(['doctor']) or main(['report', {str(tmp_path / 'model.pt')!r}]))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_report_of_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "text.txt").write_text("just text")
    assert cli.main(["report", str(tmp_path / "text.txt")]) == 2
    assert "text.txt" in error_of(capsys)
    torch.save({"weight": torch.empty(3, device="meta")}, tmp_path / "meta.pt")
    assert cli.main(["report", str(tmp_path / "meta.pt")]) == 2
    assert "meta.pt: model has tensors without data" in error_of(capsys)
    assert cli.main(["report", str(tmp_path / "missing")]) == 2
    assert error_of(capsys).endswith("missing: No such file or directory")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"weight\n": torch.zeros(3, dtype=torch.uint8).view(torch.bits8)}, "weight , torch.bits8"),
        ({"a\nb": 1}, "holds no state_dict, but a dict of"),
        ({f"{'x' * 1000}{i}": 1 for i in range(100)}, "holds no state_dict, but a dict of"),
        ({"weight": torch.zeros(1).expand(10**9, 10**9)}, "would take"),
    ],
)
def test_report_says_what_is_wrong_in_one_short_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: object, words: str
):
    torch.save(content, tmp_path / "model.pt")
    assert cli.main(["report", str(tmp_path / "model.pt")]) == 2
    error = error_of(capsys)
    assert words in error
    assert len(error) < 500


def test_demo_without_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else find(name))
    assert cli.main(["demo"]) == 2
    assert error_of(capsys) == "the demo needs rich: pip install 'triton-sparse-rnn[demo]'"


def test_demo_refuses_what_it_cannot_use(tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]):
    output = ["--output", str(tmp_path / "output")]
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    for path, message in (("missing", "no such file"), ("short.txt", "at least"), ("binary", "not a text")):
        assert cli.main(["demo", "--quick", "--text", str(tmp_path / path), *output]) == 2
        assert message in error_of(capsys)
    assert cli.main(["demo", "--quick", "--output", str(text_file)]) == 2
    assert "File exists" in error_of(capsys)


def test_demo_resumed_without_or_with_a_damaged_checkpoint(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(settings, "QUICK", eval(f"settings.Settings({TINY})"))
    arguments = ["demo", "--quick", "--resume", "--text", str(text_file), "--output", str(tmp_path)]
    assert cli.main(arguments) == 2
    assert "no checkpoint to resume" in error_of(capsys)
    (tmp_path / "checkpoint.pt").write_bytes(b"PK damaged")
    assert cli.main(arguments) == 2
    assert "checkpoint.pt: damaged" in error_of(capsys)


def test_demo_on_a_full_disk(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(settings, "QUICK", dataclasses.replace(eval(f"settings.Settings({TINY})"), steps=2))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))  # less than a checkpoint takes
    try:
        status = cli.main(["demo", "--quick", "--text", str(text_file), "--output", str(tmp_path / "output")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2
    path = tmp_path / "output" / "checkpoint.pt"
    assert error_of(capsys) == f"{path}: File too large (nothing was written)"
    assert list(path.parent.iterdir()) == []


def test_an_interrupted_demo_says_how_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_demo", interrupted)
    options = ["--quick", "--text", "my text", "--output", str(tmp_path), "--seed", "3"]
    assert cli.main(["demo", *options]) == 130
    assert error_of(capsys) == "interrupted before the first step"
    (tmp_path / "checkpoint.pt").touch()
    assert cli.main(["demo", *options, "--threads", "1"]) == 130
    words = f"--quick --text 'my text' --output {tmp_path} --seed 3 --threads 1"
    assert error_of(capsys) == f"interrupted; go on with: triton-sparse-rnn demo --resume {words}"


@pytest.mark.slow("programs")
def test_demo_interrupted_by_ctrl_c_and_resumed(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """A real SIGINT in a real process, then --resume: the same weights and bits per character as without."""
    options = ["demo", "--quick", "--text", str(text_file), "--threads", "1", "--output"]
    program = (
        "import sys\nfrom triton_sparse_rnn import cli\nfrom triton_sparse_rnn.demo import settings, training\n"
        f"settings.QUICK = settings.Settings({TINY})\n"
        "step = training.Training.step\n"
        "def slow_step(self):\n    step(self)\n    print('step', flush=True)\n    import time; time.sleep(0.01)\n"
        "training.Training.step = slow_step\n"
        f"sys.exit(cli.main({[*options, str(tmp_path / 'a')]!r}))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while (line := process.stdout.readline()) and "step" not in line:
        pass
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    resume = f"triton-sparse-rnn demo --resume --quick --text {text_file} --output {tmp_path / 'a'} --threads 1"
    assert error == f"triton-sparse-rnn: interrupted; go on with: {resume}\n"
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["checkpoint.pt"]

    monkeypatch.setattr(settings, "QUICK", eval(f"settings.Settings({TINY})"))
    assert cli.main(resume.split()[1:]) == 0
    assert cli.main([*options, str(tmp_path / "b")]) == 0
    assert "bits/char" in capsys.readouterr().out
    for file in ("model.safetensors", "model-blocks.safetensors", "dense.safetensors"):
        ours, theirs = load_file(tmp_path / "a" / file), load_file(tmp_path / "b" / file)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    resumed, whole = (json.loads((tmp_path / folder / "results.json").read_text()) for folder in "ab")
    for kind in ("dense", "picks", "blocks"):
        assert resumed["models"][kind]["bits_per_character"] == whole["models"][kind]["bits_per_character"]
