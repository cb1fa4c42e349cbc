"""The file from which an interrupted demo goes on."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import torch

from triton_sparse_rnn.checkpoint_files import CheckpointFileError, read_torch_file
from triton_sparse_rnn.demo.settings import Settings
from triton_sparse_rnn.demo.text import Text

CHECKPOINT = "checkpoint.pt"
FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another run; nothing was loaded from it."""


@dataclasses.dataclass
class Progress:
    """How far a run has come.

    Attributes:
        states: by kind ("sparse", "dense"), what `Training.state_dict` returned last.
        seconds: spent in training so far, by kind.
    """

    states: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


def save_checkpoint(path: Path, progress: Progress, settings: Settings, text: Text) -> None:
    """Write the whole file or leave the one that was there."""
    new = path.with_name(path.name + ".new")
    try:
        torch.save({"format": FORMAT, "run": _identity(settings, text), **vars(progress)}, new)
        new.replace(path)
    finally:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)


def load_checkpoint(path: Path, settings: Settings, text: Text) -> Progress:
    """Return the progress of a run with these very settings and this text.

    Raises:
        CheckpointError: saying what is wrong.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no checkpoint to resume; start without --resume")
    try:
        state = read_torch_file(path)
        theirs, version = state["run"], state["format"]
        progress = Progress(state["states"], state["seconds"])
    except (CheckpointFileError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged, or not a checkpoint of this demo; delete it ({error})") from error
    if version != FORMAT:
        raise CheckpointError(f"{path}: written by another version of this demo; delete it")
    ours = _identity(settings, text)
    changed = [name for name in ours if theirs.get(name) != ours[name]]
    if changed:
        details = ", ".join(f"{name} was {theirs.get(name)}, is {ours[name]}" for name in changed)
        raise CheckpointError(f"{path}: belongs to another run ({details}); resume with its options, or delete it")
    return progress


def _identity(settings: Settings, text: Text) -> dict[str, Any]:
    return {**dataclasses.asdict(settings), "text": f"{text.source}, SHA-256 {text.sha256[:12]}"}
