"""How long a step takes of the layers of finished runs, at batch 1, by torch.nn and by this package, side by side."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor, nn

from studies.accuracy.rows import ROWS, SEEDS, SENSITIVITY
from studies.accuracy.training import convert
from studies.runs.progress import one_thread
from studies.runs.records import Key, Lines, line_of
from studies.runs.study import weights_path
from studies.tasks import TASKS, Task
from triton_sparse_rnn import PersistentGRU, SparseGRU

UNTIMED = {row.name for row in ROWS if row.family.startswith(SENSITIVITY)}
T = 100  # steps of a call
BLOCK = (16, 1)  # in which a dense layer is stored
ROUNDS = 41  # in each of which every layer is called once


class Contender(NamedTuple):
    """A layer of a run, in two programs: `torch` runs its weights, zeros among them, as nn.GRU."""

    key: Key
    weight_dtype: str
    ours: Callable[[], Any]
    torch: Callable[[], Any]


def time_runs(
    lines: Lines,
    models: Path,
    *,
    rounds: int = ROUNDS,
    console: Console | None = None,
) -> Iterator[dict[str, Any]]:
    """Time the layers of all runs of the first seed, those of a task in turns; yield a line for each run.

    Args:
        models: the folder with the weights of the runs.
    Raises:
        OSError: the weights of a run are not there.
        ValueError: a converted layer does not do what nn.GRU does.
    """
    keys = [key for key in lines.runs if key.seed == SEEDS[0] and key.row not in UNTIMED]
    with one_thread(), torch.inference_mode():
        for task in dict.fromkeys(key.task for key in keys):
            own = {key: lines.runs[key] for key in keys if key.task == task}
            contenders = list(_contenders(TASKS[task].load(), own, models))
            times = _time_in_turns([(c.ours, c.torch) for c in contenders], rounds, f"timing {task}", console)
            for key in own:
                found = [
                    {"weight_dtype": contender.weight_dtype, "us_per_step": ours, "torch_us_per_step": theirs}
                    for contender, (ours, theirs) in zip(contenders, times, strict=True)
                    if contender.key == key
                ]
                yield line_of(key, times=found)


def _contenders(task: Task, runs: Mapping[Key, dict[str, Any]], models: Path) -> Iterator[Contender]:
    x = None
    for key, run in runs.items():
        model = task.resized(run["hidden_size"]).build_model(SparseGRU, 0).eval()
        model.load_state_dict(load_file(weights_path(models, key)))
        block_size = None if run["pruner"] else BLOCK  # or torch would multiply by an unpruned weight_ih
        for told in run["models"]:
            dtype = getattr(torch, told["weight_dtype"])
            layer = convert(model, weight_dtype=dtype, storage=block_size).rnn
            assert isinstance(layer, PersistentGRU)
            dense = layer.to_dense().eval()
            if x is None:
                x = torch.randn(T, 1, dense.input_size, generator=torch.Generator().manual_seed(0))
            _check(layer, dense, x, key)
            yield Contender(key, told["weight_dtype"], lambda f=layer, x=x: f(x), lambda f=dense, x=x: f(x))


def _check(layer: PersistentGRU, dense: nn.RNNBase, x: Tensor, key: Key) -> None:
    """Refuse a wrong result: the error against float64 is at most 4 times nn.GRU's, plus 1e-6."""
    exact = copy.deepcopy(dense).double()(x.double())[0]
    error, allowed = ((layer(x)[0] - exact).abs().max(), 4 * (dense(x)[0] - exact).abs().max() + 1e-6)
    if not error <= allowed:
        raise ValueError(f"{key}: the converted layer is {error:.1e} from float64, rounding allows {allowed:.1e}")


def _time_in_turns(
    pairs: list[tuple[Callable[[], Any], Callable[[], Any]]], rounds: int, title: str, console: Console | None
) -> list[tuple[float, float]]:
    """Return the medians of all, in microseconds per step."""
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in pairs]
    for _ in track(range(rounds), title, console=console):
        for pair, found in zip(pairs, times, strict=True):
            for run, durations in zip(pair, found, strict=True):
                run()  # brings its weights back into the cache
                begin = time.perf_counter()
                run()
                durations.append((time.perf_counter() - begin) * 1e6 / T)
    return [(statistics.median(ours), statistics.median(theirs)) for ours, theirs in times]
