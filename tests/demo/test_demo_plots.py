from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from triton_sparse_rnn.demo.plots import plot_mask, plot_training


def test_plot_training_of_one_step(tmp_path: Path):
    bits = {"dense": 2.1, "sparse": 2.3}
    plot_training(tmp_path / "plot.png", {kind: [6.0] for kind in bits}, [0.0], bits, "title")
    assert min(imread(tmp_path / "plot.png").shape[:2]) > 600


@pytest.mark.parametrize("kept", [0, 1])
def test_plot_mask_of_nothing_and_of_all(tmp_path: Path, kept: int):
    plot_mask(tmp_path / "mask.png", kept * torch.randn(20, 20), ("h",), (16, 1), "title")
    assert min(imread(tmp_path / "mask.png").shape[:2]) > 600
