import io
import itertools

import pytest
import torch
from rich.console import Console


@pytest.fixture
def quiet():
    """A console that nobody sees."""
    return Console(file=io.StringIO())


@pytest.fixture
def text():
    """A text of a few kB that can be learned a little."""
    from studies.tasks.source_text import SourceText

    return SourceText.of("numbers", ["".join(f"{k * k % 97} is {k % 7}\n" for k in range(300))])


@pytest.fixture
def talk():
    """Two voices to train on, and three recordings in each group."""
    from studies.denoising.speech import GROUPS, Speech

    generator = torch.Generator().manual_seed(0)

    def said(N):
        return 0.1 * torch.randn(N, generator=generator)

    held_out = {group: [said(1600 + 7 * i) for i in range(3)] for group in GROUPS}
    return Speech({"a": said(9000), "b": said(1000)}, held_out)


@pytest.fixture
def learn():
    """Train a model on a task for some steps at a rate."""

    def learn(task, model, steps, rate):
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        for loss in itertools.islice(task.losses(model, 0), steps):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return learn
