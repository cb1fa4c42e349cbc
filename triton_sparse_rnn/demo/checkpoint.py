"""The file from which an interrupted demo goes on."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any, TypeVar

import torch

from triton_sparse_rnn.atomic_files import write_atomically
from triton_sparse_rnn.checkpoint_files import CheckpointFileError, read_torch_file
from triton_sparse_rnn.demo.settings import Settings
from triton_sparse_rnn.demo.text import Text
from triton_sparse_rnn.pruning.state import is_plain

CHECKPOINT = "checkpoint.pt"
FORMAT = 2
T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another run; nothing was loaded from it."""


@dataclasses.dataclass
class Progress:
    """How far a run has come.

    Attributes:
        states: by kind (settings.PATTERNS), what `Training.state_dict` returned last.
        seconds: spent in training so far, by kind.
    """

    states: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


def save_checkpoint(path: Path, progress: Progress, settings: Settings, text: Text) -> None:
    """Write the whole file or leave the one that was there.

    Raises:
        OSError: it cannot be written.
    """
    content = io.BytesIO()  # of a full disk torch.save would say what is no OSError
    torch.save({"format": FORMAT, "run": _identity(settings, text), **vars(progress)}, content)
    write_atomically(path, [content.getbuffer()])


def load_checkpoint(path: Path, settings: Settings, text: Text) -> Progress:
    """Return the progress of a run with these very settings and this text.

    Raises:
        CheckpointError: saying what is wrong.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no checkpoint to resume; start without --resume")
    try:
        state = read_torch_file(path)
        theirs, version = _expect(dict, state, "run"), _expect(int, state, "format")
        progress = Progress(_expect(dict, state, "states"), _expect(dict, state, "seconds"))
        for kind in progress.states:
            _expect(dict, progress.states, kind)
        for kind in progress.seconds:
            _expect(float, progress.seconds, kind)
        ours = _identity(settings, text)
        if foreign := [name for name in ours if not is_plain(theirs.get(name))]:
            raise TypeError(f"{foreign[0]!r} is a {type(theirs[foreign[0]]).__name__}")
    except (CheckpointFileError, KeyError, TypeError) as error:
        raise damaged(path, error) from error
    if version != FORMAT:
        raise CheckpointError(f"{path}: written by another version of this demo; delete it")
    changed = [name for name in ours if theirs.get(name) != ours[name]]
    if changed:
        details = ", ".join(f"{name} was {theirs.get(name)}, is {ours[name]}" for name in changed)
        raise CheckpointError(f"{path}: belongs to another run ({details}); resume with its options, or delete it")
    return progress


def damaged(path: Path, why: Exception) -> CheckpointError:
    """Return the error of a checkpoint that cannot be used, in one line."""
    reason = " ".join(str(why).split()) or type(why).__name__
    return CheckpointError(f"{path}: damaged, or not a checkpoint of this demo; delete it ({reason})")


def _expect(wanted: type[T], state: Any, name: str) -> T:
    """Return an entry, or raise TypeError or KeyError."""
    value = state[name]
    if not isinstance(value, wanted):
        raise TypeError(f"{name!r} is a {type(value).__name__}, not a {wanted.__name__}")
    return value


def _identity(settings: Settings, text: Text) -> dict[str, Any]:
    return {**dataclasses.asdict(settings), "text": f"{text.source}, SHA-256 {text.sha256[:12]}"}
