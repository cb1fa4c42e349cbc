import dataclasses
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from triton_sparse_rnn.demo.checkpoint import CheckpointError, Progress, load_checkpoint, save_checkpoint
from triton_sparse_rnn.demo.settings import Settings
from triton_sparse_rnn.demo.text import Text


@pytest.fixture
def path(tmp_path: Path, tiny: Settings, text: Text) -> Path:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(
        path, Progress({"picks": {"model": {"w": torch.arange(500.0)}, "h": None}}, {"picks": 1.5}), tiny, text
    )
    return path


def test_comes_back(path: Path, tiny: Settings, text: Text):
    progress = load_checkpoint(path, tiny, text)
    assert progress.seconds == {"picks": 1.5}
    assert torch.equal(progress.states["picks"]["model"]["w"], torch.arange(500.0))
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]


def test_other_settings_and_other_text_are_named(path: Path, tiny: Settings, text: Text):
    with pytest.raises(CheckpointError, match=r"another run .hidden_size was 20, is 21, seed was 0, is 1."):
        load_checkpoint(path, dataclasses.replace(tiny, hidden_size=21, seed=1), text)
    with pytest.raises(CheckpointError, match=r"text was .* SHA-256"):
        load_checkpoint(path, tiny, dataclasses.replace(text, sha256="0" * 64))


def test_missing(tmp_path: Path, tiny: Settings, text: Text):
    with pytest.raises(CheckpointError, match="no checkpoint to resume; start without --resume"):
        load_checkpoint(tmp_path / "checkpoint.pt", tiny, text)


@pytest.mark.parametrize("content", [b"", b"something else", b"PK\x03\x04"])
def test_foreign_file(tmp_path: Path, tiny: Settings, text: Text, content: bytes):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged, or not a checkpoint of this demo"):
        load_checkpoint(path, tiny, text)


def test_another_version(path: Path, tiny: Settings, text: Text):
    torch.save(torch.load(path, weights_only=True) | {"format": 0}, path)
    with pytest.raises(CheckpointError, match="written by another version"):
        load_checkpoint(path, tiny, text)


@pytest.mark.parametrize(
    "change",
    [
        [1, 2],
        {"run": 5},
        {"run": None},
        {"run": [1, 2]},
        {"run": torch.ones(3)},
        {"format": torch.ones(2)},
        {"format": "1"},
        {"states": 5},
        {"states": ["picks"]},
        {"states": {"picks": 5}},
        {"states": {"picks": [torch.ones(2)]}},
        {"seconds": None},
        {"seconds": {"picks": "1.5"}},
        {"seconds": {"picks": torch.ones(2)}},
    ],
    ids=str,
)
def test_foreign_entries_are_like_any_damage(path: Path, tiny: Settings, text: Text, change: Any):
    torch.save(torch.load(path, weights_only=True) | change if isinstance(change, dict) else change, path)
    with pytest.raises(CheckpointError, match="damaged, or not a checkpoint of this demo") as caught:
        load_checkpoint(path, tiny, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [torch.ones(2), torch.ones(2).to_sparse(), {"a": 1}, [[1]]], ids=str)
def test_settings_that_are_no_plain_values(path: Path, tiny: Settings, text: Text, value: object):
    state = torch.load(path, weights_only=True)
    for name in ("hidden_size", "learning_rate", "text"):
        torch.save(state | {"run": state["run"] | {name: value}}, path)
        with pytest.raises(CheckpointError, match=f"damaged, .*'{name}' is a {type(value).__name__}"):
            load_checkpoint(path, tiny, text)


def test_a_full_disk(path: Path, tiny: Settings, text: Text):
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="the file that was there is as it was") as caught:
            save_checkpoint(path, Progress({"picks": {"model": torch.zeros(10_000)}}), tiny, text)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]


def test_damage_is_found(path: Path, tiny: Settings, text: Text):
    data = path.read_bytes()
    at = data.index(torch.arange(500.0).numpy().tobytes())
    for damaged in (data[: at + 1000], data[:-1], data[: at + 99] + b"\x99" + data[at + 100 :], data[at:]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(path, tiny, text)


def test_a_failed_save_leaves_the_old_file(path: Path, tiny: Settings, text: Text):
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        save_checkpoint(path, Progress({"picks": {"model": lambda: None}}), tiny, text)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]
