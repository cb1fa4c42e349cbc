import random
from pathlib import Path

import pytest

from triton_sparse_rnn.demo.settings import Settings
from triton_sparse_rnn.demo.text import Text, load_text


@pytest.fixture(autouse=True)
def _on_one_thread(one_thread: None) -> None: ...


@pytest.fixture(scope="session")
def tiny() -> Settings:
    """A run of seconds, with awkward sizes: 20 units leave a remainder in blocks of 16."""
    return Settings(
        input_size=7,
        hidden_size=20,
        batch_size=3,
        window=11,
        steps=14,
        prune_every=2,
        held_out=900,
        generated=40,
        checkpoint_every=5,
        threads=1,
    )


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 kB of text with characters of one, two and three bytes."""
    words = "Wenn der Regen fällt — dann wächst das Gras, und alle Kühe lachen."
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(draw.choice(words.split()) for _ in range(3500)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def text(text_file: Path) -> Text:
    return load_text(text_file)
