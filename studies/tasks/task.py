"""What a task is to the programs that train on it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn
from torch.nn import RNNBase

from studies.tasks.teacher import Teacher

MakeRNN = Callable[..., RNNBase]  # nn.LSTM, SparseGRU, ...: called with sizes and options as these are
HeldOut = Literal["validation", "test"]  # what choices are made on, and what none of them has seen


class MissingDataError(RuntimeError):
    """The data of a task is not there; the message says where to get it."""


class Metric(NamedTuple):
    """A number that `Task.evaluate` returns; less is better."""

    key: str
    heading: str
    digits: int  # after the point

    def text(self, quality: Mapping[str, float]) -> str:
        return f"{self.heading} {quality[self.key]:.{self.digits}f}"


def straight_rate(step: int, steps: int, warmup: float, held: float = 0.0) -> float:
    """By which a peak rate is multiplied at a step from 0 to steps - 1: a straight warm-up, then straight down to 0.

    Args:
        warmup: share of the steps.
        held: share of the steps before which the rate does not fall; 1: it never does.
    """
    begin = max(warmup, held)
    falling = 1.0 if begin == 1 else (steps - step) / (steps - begin * steps)
    return min(1.0, (step + 1) / (warmup * steps + 1), falling)


def share_of(name: str) -> float:
    """Return a number in [0, 1) that only the name decides."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32


def split_of(family: str, validation: float, test: float) -> Literal["train", "validation", "test"]:
    """Return the split of everything in a family, which its name alone decides.

    Args:
        validation, test: shares of the families.
    """
    share = share_of(family)
    if share < validation:
        return "validation"
    return "test" if share < validation + test else "train"


def numbers_of(task: Any) -> dict[str, int | float]:
    """Return the fields of a dataclass that are numbers."""
    return {name: value for name, value in vars(task).items() if isinstance(value, int | float)}


class Task:
    """Data in three splits, a model for it, and how well the model does. A task is a frozen dataclass.

    Attributes:
        name: of the task on a command line.
        metrics: of `evaluate`. Models are compared by the first.
        hidden_size: of the recurrent layer.
        batch_size: predictions whose mean the loss of a step is, unless `loss_scale` says otherwise.
        peak_rate: the largest of Adam's rates.
        steps: optimizer steps of a run, unless told otherwise.
        warmup: share of the steps in which the rate rises.
    """

    name: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]
    hidden_size: int
    batch_size: int
    peak_rate: float
    steps: int
    warmup: float = 0.0

    @classmethod
    def load(cls) -> Task:
        """Read the data.

        Raises:
            MissingDataError: it is not there.
        """
        raise NotImplementedError

    def resized(self, hidden_size: int, inputs: float = 1.0) -> Task:
        """Return the task with a recurrent layer of that width.

        Args:
            inputs: of the layer, as a share of what they are; less than 1 only where they are an embedding.
        """
        embedding = {} if inputs == 1 else {"embedding_size": round(inputs * vars(self)["embedding_size"])}
        return dataclasses.replace(self, hidden_size=hidden_size, **embedding)  # type: ignore[type-var]

    @property
    def loss_scale(self) -> float:
        """By which the sum of the losses of all predictions is multiplied to give the loss of a step."""
        return 1 / self.batch_size

    def learning_rate(self, step: int, steps: int, held: float = 0.0) -> float:
        """Adam's rate at a step from 0 to steps - 1; see `straight_rate`."""
        return self.peak_rate * straight_rate(step, steps, self.warmup, held)

    def settings(self) -> dict[str, Any]:
        """What decides the outcome of a run, for JSON."""
        raise NotImplementedError

    def build_model(self, make_rnn: MakeRNN, seed: int) -> nn.Module:
        """Return a model whose only recurrent layer is its attribute `rnn`, with initial weights drawn from `seed`."""
        raise NotImplementedError

    def losses(self, model: nn.Module, seed: int, teacher: Teacher | None = None) -> Iterator[Tensor]:
        """Yield the loss of one batch after another, without end, in an order drawn from `seed`.

        The weights may change between one and the next.

        Args:
            teacher: is asked the same, and adds to the loss.
        """
        raise NotImplementedError

    def evaluate(self, model: nn.Module, split: HeldOut) -> dict[str, float]:
        """Return every metric on a split that the model was not trained on, of a model in eval mode."""
        raise NotImplementedError
