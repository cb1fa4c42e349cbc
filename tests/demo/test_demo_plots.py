from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from triton_sparse_rnn.demo.plots import plot_mask, plot_training


@pytest.mark.parametrize("steps", [1, 2, 300])
def test_plot_training(tmp_path: Path, steps: int):
    losses = {"dense": torch.linspace(6, 2, steps).tolist(), "sparse": torch.linspace(6, 2.2, steps).tolist()}
    sparsities = torch.linspace(0, 0.9, steps).tolist()
    plot_training(tmp_path / "plot.png", losses, sparsities, {"dense": 2.1, "sparse": 2.3}, "title")
    assert min(imread(tmp_path / "plot.png").shape[:2]) > 600


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_plot_mask(tmp_path: Path, density: float):
    weight = torch.randn(3 * 20, 20) * (torch.rand(3 * 20, 20) < density)
    plot_mask(tmp_path / "mask.png", weight, ("r", "z", "n"), (16, 1), "title")
    assert min(imread(tmp_path / "mask.png").shape[:2]) > 600
