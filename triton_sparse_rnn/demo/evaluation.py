"""Bits per character on text that was held out, and whether a converted model still says the same."""

from __future__ import annotations

import copy
import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triton_sparse_rnn.demo.text import Text
from triton_sparse_rnn.demo.training import cut_into_streams

STREAMS = 32
WINDOW = 256


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The largest difference between the outputs of two models, and what rounding may account for."""

    difference: float
    allowed: float

    def __str__(self) -> str:
        return f"largest difference of an output {self.difference:.1e}, rounding allows {self.allowed:.1e}"


class WrongResultError(RuntimeError):
    """The converted model does not say what the trained one says; no number may be shown for it."""


@torch.inference_mode()
def bits_per_character(model: nn.Module, text: Text, count: int) -> float:
    """Score the first `count` held-out symbols, read as up to 32 streams with the state carried along.

    A symbol OTHER also costs the bits that say which byte it was.
    """
    symbols = text.held_out[:count]
    streams = cut_into_streams(symbols, max(1, min(STREAMS, len(symbols) // WINDOW))).long()
    h, nats, others = None, 0.0, 0
    for start in range(0, len(streams) - 1, WINDOW):
        ids = streams[start : start + WINDOW + 1]
        scores, h = model(ids[:-1], h)
        nats += F.cross_entropy(scores.flatten(0, 1), ids[1:].flatten(), reduction="sum").item()
        others += int((ids[1:] == len(text.vocabulary) - 1).sum())
    scored = (len(streams) - 1) * streams.shape[1]
    bits = nats / math.log(2) + others * text.vocabulary.other_bits
    return bits / scored * text.bytes_per_character


@torch.inference_mode()
def check_same_outputs(trained: nn.Module, converted: nn.Module, ids: Tensor) -> Comparison:
    """Compare the scores and states of two models on ids [T, B].

    The limit is earned: four times the error that the trained model itself has against float64, plus 1e-6 of the
    largest score.

    Raises:
        WrongResultError: the difference is above the limit, or not a number.
    """
    ours, h = converted(ids)
    theirs, theirs_h = trained(ids)
    exact, _ = copy.deepcopy(trained).double()(ids)
    allowed = 4 * float((theirs - exact).abs().max()) + 1e-6 * float(exact.abs().max())
    comparison = Comparison(max(float((ours - theirs).abs().max()), float((h - theirs_h).abs().max())), allowed)
    if not comparison.difference <= allowed:  # NaN is no success
        raise WrongResultError(f"the converted model is not the trained one: {comparison}")
    return comparison


@torch.inference_mode()
def check_rounding(exact: nn.Module, reference: nn.Module, converted: nn.Module, ids: Tensor) -> None:
    """Compare what rounding activations does to the scores of `converted` and of `reference`, on ids [T, B].

    Two right programs may round a number halfway between two integers each to its own side, and h remembers it: their
    outputs differ like two throws of the same dice. What must be alike is how far they are from `exact`, the model that
    rounds no activations: by root mean square at most twice as far as the reference, plus 1e-6 of the largest score.

    Raises:
        WrongResultError: `converted` is farther from it, or not a number.
    """
    scores = exact(ids)[0]
    ours, theirs = (float((model(ids)[0] - scores).square().mean().sqrt()) for model in (converted, reference))
    if not ours <= 2 * theirs + 1e-6 * float(scores.abs().max()):  # NaN is no success
        raise WrongResultError(
            f"the model with rounded activations is not the one of the reference: it is {ours:.1e} from the model that "
            f"rounds none, the reference {theirs:.1e}"
        )
