"""Text from a model, one symbol after another, and how long one takes."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from triton_sparse_rnn.demo.model import CharacterModel

Step = Callable[[Tensor, Any], "tuple[Tensor, Any]"]


def draw_noise(count: int, vocabulary_size: int, seed: int) -> Tensor:
    """Return Gumbel noise [count, V]: the index of the largest of scores + noise is a sample of softmax(scores).

    The last symbol, OTHER, is never drawn.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    uniform = torch.rand(count, vocabulary_size, generator=generator, dtype=torch.float32, device="cpu")
    noise = -torch.log(-torch.log(uniform.clamp(1e-9, 1 - 1e-7)))
    noise[:, -1] = -torch.inf
    return noise


@torch.inference_mode()
def generate(
    model: CharacterModel,
    prompt: Tensor,
    noise: Tensor,
    *,
    temperature: float = 1.0,
    on_symbol: Callable[[int], object] | None = None,
) -> list[int]:
    """Continue `prompt` as a stream: batch 1, one step of the layer per symbol.

    Args:
        prompt: [N >= 1], int64 symbols.
        noise: [count, V] from `draw_noise`; one symbol is drawn for each row.
        temperature: 1 samples the model's own distribution, less is more cautious.
        on_symbol: called with each symbol as soon as it is there.
    Returns:
        The symbols that were drawn.
    """
    step, drawn, h = step_of(model.rnn), [], None
    noise = noise * temperature  # the sample of scores / temperature, without a division for each symbol
    if len(prompt) > 1:
        _, h = model(prompt[:-1, None])
    last = prompt[-1:]
    for row in noise:
        y, h = step(model.embedding(last), h)
        last = (model.decoder(y) + row).argmax(1)
        drawn.append(last.item())
        if on_symbol is not None:
            on_symbol(drawn[-1])
    return drawn


def step_of(rnn: Any) -> Step:
    """Return a function of x [1, I] and h [1, 1, H] that advances the layer by one step, giving y [1, H] and h."""
    if hasattr(rnn, "step"):
        return rnn.step

    def step(x: Tensor, h: Any) -> tuple[Tensor, Any]:
        y, h = rnn(x[None], h)
        return y[0], h

    return step


@dataclasses.dataclass(frozen=True)
class StreamTime:
    """Microseconds per symbol at batch 1: the whole loop of `generate`, and its recurrent layer by itself."""

    loop_us: float
    layer_us: float


@torch.inference_mode()
def time_streams(
    models: Mapping[str, CharacterModel], prompt: Tensor, noise: Tensor, rounds: int = 7
) -> dict[str, StreamTime]:
    """Time all models on one thread, in turns, so that a busy machine slows them alike; medians over the rounds.

    Returns:
        A `StreamTime` for each name.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        loops: dict[str, list[float]] = {name: [] for name in models}
        layers: dict[str, list[float]] = {name: [] for name in models}
        for model in models.values():
            generate(model, prompt, noise[:50])  # warm up
        for _ in range(rounds):
            for name, model in models.items():
                loops[name].append(_time_us(lambda model=model: generate(model, prompt[-1:], noise), len(noise)))
                layers[name].append(_time_us(lambda model=model: _run_layer(model.rnn, len(noise)), len(noise)))
    finally:
        torch.set_num_threads(threads)
    return {name: StreamTime(statistics.median(loops[name]), statistics.median(layers[name])) for name in models}


def _run_layer(rnn: Any, count: int) -> None:
    step, h = step_of(rnn), None
    x = torch.zeros(1, rnn.input_size, dtype=torch.float32, device="cpu")
    for _ in range(count):
        _, h = step(x, h)


def _time_us(run: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) / count * 1e6
