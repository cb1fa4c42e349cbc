import io

import pytest
from rich.console import Console


@pytest.fixture
def quiet():
    """A console that nobody sees."""
    return Console(file=io.StringIO())


@pytest.fixture
def text(tmp_path):
    """A text of a few kB that can be learned a little."""
    from triton_sparse_rnn.demo.text import load_text

    path = tmp_path / "text"
    path.write_text("".join(f"{k * k % 97} is {k % 7}\n" for k in range(300)), encoding="utf-8")
    return load_text(path)
