"""The training of one character model: the same steps for all, with a pruner for the sparse ones."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triton_sparse_rnn.demo.model import build_model
from triton_sparse_rnn.demo.settings import PATTERNS, Settings
from triton_sparse_rnn.demo.text import Text
from triton_sparse_rnn.nn.training import SparseGRU
from triton_sparse_rnn.pruning.forecast import Forecast, forecast
from triton_sparse_rnn.pruning.pruner import Pruner
from triton_sparse_rnn.pruning.schedules import PolynomialDecay
from triton_sparse_rnn.sparse.patterns import Pattern


class Training:
    """One model on its way through the text.

    Text is read as `batch_size` streams side by side; the state of the layer is carried from window to window
    (truncated back-propagation), so a step depends on nothing but what `state_dict` holds.

    Attributes:
        pattern: in which the model is pruned, None for the dense one.
        forecast: of what the pruner will leave, None for the dense model.
        losses: bits per symbol at each step so far.
        sparsities: of the pruned weights after each step; 0 throughout for the dense model.
    """

    def __init__(self, kind: str, settings: Settings, text: Text) -> None:
        self.kind = kind
        self.pattern = PATTERNS[kind]
        self.settings = settings
        self.model = build_model(
            SparseGRU if self.pattern else nn.GRU,
            len(text.vocabulary),
            settings.input_size,
            settings.hidden_size,
            seed=settings.seed,
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.learning_rate)
        self.pruner = build_pruner(self.model, settings, self.pattern) if self.pattern else None
        if self.pruner is not None:
            self.pruner.attach(self.optimizer)
        self.forecast: Forecast | None = forecast(self.model, self.pruner) if self.pruner is not None else None
        self.streams = cut_into_streams(text.train, settings.batch_size)
        self.h: Tensor | None = None
        self.losses: list[float] = []
        self.sparsities: list[float] = []

    @property
    def step_count(self) -> int:
        return len(self.losses)

    @property
    def finished(self) -> bool:
        return self.step_count >= self.settings.steps

    def step(self) -> None:
        """Take one optimizer step on the next window."""
        inputs, targets = self._next_window()
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.step_count, self.settings)
        scores, h = self.model(inputs, self.h)
        loss = F.cross_entropy(scores.flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        self.h = h.detach()
        self.losses.append(loss.item() / math.log(2))
        self.sparsities.append(float(self.pruner.sparsity) if self.pruner is not None else 0.0)

    def _next_window(self) -> tuple[Tensor, Tensor]:
        """Return inputs and targets [T, B]; at the end of the streams start again, with a fresh state."""
        T = self.settings.window
        index = self.step_count % ((len(self.streams) - 1) // T)
        if index == 0:
            self.h = None
        ids = self.streams[index * T : (index + 1) * T + 1].long()
        return ids[:-1], ids[1:]

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on to the bit: tensors, numbers and lists only."""
        return {
            "kind": self.kind,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pruner": self.pruner.state_dict() if self.pruner is not None else None,
            "h": self.h,
            "losses": list(self.losses),
            "sparsities": list(self.sparsities),
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            Exception: it returned something else. Then this training is good for nothing any more.
        """
        options = self._optimizer_options()
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.pruner is not None:
            self.pruner.load_state_dict(state["pruner"])
        self.h = state["h"]
        self.losses = list(state["losses"])
        self.sparsities = list(state["sparsities"])
        torch.set_rng_state(state["random"])
        self._check_loaded(state["kind"], options)

    def _optimizer_options(self) -> list[dict[str, Any]]:
        given = ("params", "lr")  # the rate is set at every step
        return [{key: one for key, one in group.items() if key not in given} for group in self.optimizer.param_groups]

    def _check_loaded(self, kind: object, options: list[dict[str, Any]]) -> None:
        """Raise ValueError for what is taken over without a look and would make a later step fail, or go wrong."""
        settings, steps = self.settings, self.step_count
        if kind != self.kind:
            raise ValueError(f"it is of a {kind!r} training, not of a {self.kind!r} one")
        for name, history in (("losses", self.losses), ("sparsities", self.sparsities)):
            if len(history) != steps or steps > settings.steps or not all(isinstance(one, float) for one in history):
                raise ValueError(f"{name} must be numbers, one for each step")
        if self.pruner is not None and self.pruner.step_count != steps:
            raise ValueError(f"the pruner is at step {self.pruner.step_count}, losses are of {steps} steps")
        h_shape = (1, settings.batch_size, settings.hidden_size)
        if self.h is not None and not _is_plain_tensor(self.h, h_shape, self.model.decoder.weight.dtype):
            raise ValueError("h must be a state of the layer")
        parameters = [*self.model.parameters()]
        if self._optimizer_options() != options or len(self.optimizer.state) != (len(parameters) if steps else 0):
            raise ValueError("the optimizer's options or state are not those of this training")
        for parameter, held in self.optimizer.state.items():
            shapes = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
            if held.keys() != shapes.keys() or not all(
                _is_plain_tensor(held[name], shape, torch.float32) for name, shape in shapes.items()
            ):
                raise ValueError("the optimizer's state does not fit the weights")


def _is_plain_tensor(value: object, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    if not isinstance(value, Tensor) or value.is_nested or value.layout != torch.strided or value.is_meta:
        return False
    return value.shape == shape and value.dtype == dtype


def train(training: Training, *, save: Callable[[], None], on_step: Callable[[], None]) -> None:
    """Go on until the training is finished; `save` is called now and then, at the end and at Ctrl-C.

    Raises:
        KeyboardInterrupt: after the step under way and a call of `save`. A second Ctrl-C does not wait for them.
    """
    with _interrupt_after_step() as interrupted:
        while not (training.finished or interrupted.is_set()):
            training.step()
            on_step()
            if training.step_count % training.settings.checkpoint_every == 0:
                save()
        save()
    if interrupted.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def _interrupt_after_step() -> Iterator[threading.Event]:
    """Let the first Ctrl-C set an event, the second raise as usual; only the main thread hears of either."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def remember(*_: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def build_pruner(model: nn.Module, settings: Settings, pattern: Pattern) -> Pruner:
    """Return a pruner of the recurrent and input weights, on the cubic ramp of Zhu & Gupta (2017)."""
    begin = max(1, round(settings.prune_begin * settings.steps))
    updates = max(1, round((settings.prune_end - settings.prune_begin) * settings.steps / settings.prune_every))
    schedule = PolynomialDecay(
        final_sparsity=settings.sparsity,
        begin_step=begin,
        end_step=begin + updates * settings.prune_every,
        frequency=settings.prune_every,
    )
    return Pruner(model, schedule, pattern=pattern)


def learning_rate(step: int, settings: Settings) -> float:
    """A straight warm-up, then half a cosine down to 0."""
    warmup = settings.warmup * settings.steps
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / (settings.steps - warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def cut_into_streams(symbols: Tensor, count: int) -> Tensor:
    """Cut [N] into `count` stretches of text side by side, [N // count, count]; the rest is left out."""
    length = len(symbols) // count
    return symbols[: length * count].view(count, length).t().contiguous()
