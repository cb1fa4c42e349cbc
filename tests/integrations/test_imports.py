import subprocess
import sys

import pytest

NAMES = ("lightning", "pytorch_lightning", "transformers", "accelerate")


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_the_package_and_the_core_of_the_callbacks_load_no_trainer():
    code = "import sys, triton_sparse_rnn.integrations.pruned_training; "
    assert run(f"{code}print([name for name in {NAMES} if name in sys.modules])") == "[]"


@pytest.mark.parametrize("name", ["lightning", "huggingface"])
def test_without_the_trainer_it_is_said_what_to_install(name, monkeypatch):
    monkeypatch.delitem(sys.modules, f"triton_sparse_rnn.integrations.{name}", raising=False)
    for module in [*NAMES, *(module for module in sys.modules if module.partition(".")[0] in NAMES)]:
        monkeypatch.setitem(sys.modules, module, None)  # importing it raises
    with pytest.raises(ImportError, match=rf"pip install 'triton-sparse-rnn\[{name}\]'"):
        __import__(f"triton_sparse_rnn.integrations.{name}")
