"""How long a frame takes, streamed one by one and in whole sequences: batch 1, one thread, from features to gains.

A frame of the models comes every 10 ms. All contenders take turns, in several rounds, so that a machine that is slower
for a while is so for all of them; the fastest round of each is what the table shows.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor

from studies.denoising.conversion import WEIGHT_DTYPES, convert, stored_bytes
from studies.denoising.model import Denoiser, load_original
from studies.denoising.onnx_original import OnnxOriginal, OnnxStream, streaming_session
from studies.denoising.rows import BY_NAME, TASK
from studies.denoising.signals import HOP, features, spectrum
from studies.runs.progress import one_thread
from studies.runs.records import Key, Lines, line_of
from studies.runs.study import weights_path
from triton_sparse_rnn import warm_up
from triton_sparse_rnn.nn.persistent_module import PersistentModule

SPEED_TASK = f"{TASK}, speed"
ONNXRUNTIME, TORCH = "original, onnxruntime", "original, nn.GRU"
FRAMES, ROUNDS = 100, 15
STEADY = 1.3  # the median of all rounds to the fastest, at most, on a machine that has nothing else to do
LARGEST_ERROR = 1e-5  # of a gain, streamed against whole


class Stream(Protocol):
    """A stream from a state of zeros; see OnnxStream."""

    def frames(self, features: Tensor) -> Sequence[Any]: ...
    def step(self, frame: Any) -> Any: ...


class TorchStream:
    """A stream of frames through a Denoiser, converted or not, from a state of zeros."""

    def __init__(self, model: Denoiser) -> None:
        self._model = model
        self._hx: Tensor | None = None

    def frames(self, features: Tensor) -> list[Tensor]:
        """Return features [T, BINS] as T frames [1, BINS]."""
        return [*features.unsqueeze(1)]

    def step(self, frame: Tensor) -> Tensor:
        """Return the gains of the next frame, [1, BINS]."""
        gains, self._hx = self._model.step(frame, self._hx)
        return gains


class Contender(NamedTuple):
    """A model as it is used.

    Attributes:
        whole: features [1, T, BINS] -> gains.
        stream: begins a stream.
        nbytes: of its weights.
    """

    name: str
    whole: Callable[[Tensor], Tensor]
    stream: Callable[[], Stream]
    nbytes: int

    @classmethod
    def of(cls, name: str, model: Denoiser) -> Contender:
        if any(isinstance(module, PersistentModule) for module in model.modules()):
            warm_up(model)
        return cls(name, lambda features: model(features)[0], lambda: TorchStream(model), stored_bytes(model))


def time_all(lines: Lines, models: Path, *, console: Console | None = None) -> Iterator[dict[str, Any]]:
    """Time the original, and the models of seed 0 that were not pruned in one go; yield a line for each.

    Args:
        models: the folder with the weights of the runs.
    Raises:
        OSError: weights are missing.
        ValueError: a stream gives other gains than the whole sequence.
    """
    console = Console() if console is None else console
    with one_thread(), torch.inference_mode():
        contenders = _contenders(lines.runs, models)
        sound = torch.randn(FRAMES * HOP, generator=torch.Generator().manual_seed(0))
        sequence = features(spectrum(sound))[:FRAMES]
        errors = {contender.name: _streaming_error(contender, sequence) for contender in contenders}
        times: dict[str, dict[str, list[float]]] = {name: {"streamed_us": [], "whole_us": []} for name in errors}
        for _ in track(range(ROUNDS), "rounds", console=console):
            for contender in contenders:
                found = times[contender.name]
                found["streamed_us"].append(_streamed_us(contender, sequence))
                found["whole_us"].append(_whole_us(contender, sequence))
    slowdown = max(statistics.median(us) / min(us) for found in times.values() for us in found.values())
    if slowdown > STEADY:
        console.print(f"The machine was busy: rounds differ by a factor of {slowdown:.1f}. Time it again.", style="red")
    for contender in contenders:
        facts: dict[str, Any] = {
            name: {"median": statistics.median(us), "least": min(us)} for name, us in times[contender.name].items()
        }
        facts |= {"nbytes": contender.nbytes, "streaming_error": errors[contender.name]}
        yield line_of(Key(SPEED_TASK, contender.name, 0, 0), settings={"frames": FRAMES, "rounds": ROUNDS}, **facts)


def contender_name(row: str, weight_dtype: str) -> str:
    """What the times of a converted model are filed under."""
    return f"{row}, {weight_dtype}"


def _contenders(runs: Iterable[Key], models: Path) -> list[Contender]:
    original = load_original()
    stream = functools.partial(OnnxStream, streaming_session())
    found = [
        Contender(ONNXRUNTIME, OnnxOriginal(), stream, stored_bytes(original)),
        Contender.of(TORCH, original),
    ]
    for key in runs:
        row = BY_NAME.get(key.row)
        if row is None or not row.gradual or key.seed != 0:
            continue
        model = Denoiser().eval()
        model.load_state_dict(load_file(weights_path(models, key)))
        for name, weight_dtype in WEIGHT_DTYPES.items():
            converted = convert(model, linear_too=row.linear_too, weight_dtype=weight_dtype)
            found.append(Contender.of(contender_name(row.name, name), converted))
    return found


def _streaming_error(contender: Contender, sequence: Tensor) -> float:
    """Return the largest difference between gains streamed and gains of the whole sequence."""
    stream = contender.stream()
    streamed = torch.stack([torch.as_tensor(stream.step(frame)).flatten() for frame in stream.frames(sequence)])
    error = (streamed - contender.whole(sequence[None])[0]).abs().max().item()
    if not error <= LARGEST_ERROR:
        raise ValueError(f"{contender.name}: gains streamed and of the whole sequence differ by {error:.1e}")
    return error


def _streamed_us(contender: Contender, sequence: Tensor) -> float:
    """Return the median time of a frame."""
    stream = contender.stream()
    times = []
    for frame in stream.frames(sequence):
        began = time.perf_counter()
        stream.step(frame)
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def _whole_us(contender: Contender, sequence: Tensor) -> float:
    """Return the time of a whole sequence by its frames."""
    began = time.perf_counter()
    contender.whole(sequence[None])
    return (time.perf_counter() - began) / len(sequence) * 1e6
