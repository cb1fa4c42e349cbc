from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from triton_sparse_rnn.demo.plots import plot_mask, plot_training
from triton_sparse_rnn.sparse.patterns import Blocks, Pattern
from triton_sparse_rnn.sparse.picks import Picks


def test_plot_training_of_one_step(tmp_path: Path):
    bits = {"dense": 2.1, "picks": 2.3, "blocks": 2.4}
    plot_training(tmp_path / "plot.png", {kind: [6.0] for kind in bits}, [0.0], bits, "title")
    assert min(imread(tmp_path / "plot.png").shape[:2]) > 600


@pytest.mark.parametrize("pattern", [Picks(), Picks(8, 16, 2), Blocks(16, 1)], ids=str)
@pytest.mark.parametrize("kept", [0, 1])
def test_plot_mask_of_nothing_and_of_all(tmp_path: Path, kept: int, pattern: Pattern):
    plot_mask(tmp_path / "mask.png", kept * torch.randn(20, 20), ("h",), pattern, "title")
    assert min(imread(tmp_path / "mask.png").shape[:2]) > 600
