"""Every Python block of the README runs, one after the other, as a reader would run them."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).resolve().parent.parent / "README.md"


def python_blocks(text: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))


@pytest.mark.filterwarnings("ignore:.*little to skip")  # the example trains for a few steps and is not yet sparse
def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    code = python_blocks(README.read_text(encoding="utf-8"))
    assert "to_sparse" in code
    exec(compile(code, str(README), "exec"), {"__name__": "readme"})
