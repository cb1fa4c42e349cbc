"""Every example runs in its quick form, without a warning, and ends with the line that it should."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NUMBER = r"\d+\.\d+"
LAST_LINES = {
    "compile_and_export": r"torch\.export, saved and loaded +largest difference 0\.0e\+00",
    "export_c": rf"in C +{NUMBER}  largest difference [0-9]e-0[67], [\d,]+ bytes of weights, [\d,]+ of program",
    "huggingface_callback": r"converted, saved and loaded +\d+\.\d\d% +[\d,]+ +\d+\.\d",
    "lightning_callback": r"converted, saved and loaded +0\.\d{4} +[\d,]+ +\d+\.\d",
    "lstm_gate_gradients": rf"and 90 % of the weights pruned +{NUMBER} +\d\d\.\d% +[45]\d\.\d% +{NUMBER} s",
    "prune_a_trained_model": rf"fine-tuned, zeros kept, converted +{NUMBER} bits per byte +1\d\d,\d{{3}} bytes",
    "unstructured_checkpoint": rf"converted, in picks +{NUMBER} bits per byte +{NUMBER} us a step",
    "streaming": rf"PersistentGRU, 90 % zeros +{NUMBER} +{NUMBER} +{NUMBER} +{NUMBER}",
}
PROGRAMS = {"export_c": ["cc"]}  # Skipped without these programs.
# Skipped without these; and whose warnings are theirs.
NEEDS = {"huggingface_callback": ["transformers", "accelerate"], "lightning_callback": ["lightning"]}


def run(example: str, folder: Path) -> str:
    """Return what an example prints in its quick form."""
    strict = [] if example in NEEDS else ["-W", "error"]
    command = [sys.executable, *strict, str(EXAMPLES / f"{example}.py"), "--quick"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= set(LAST_LINES)


@pytest.mark.slow("programs")
@pytest.mark.parametrize("example", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_example(example, tmp_path):
    for package in NEEDS.get(example, ()):
        pytest.importorskip(package)
    for program in PROGRAMS.get(example, ()):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    last = run(example, tmp_path).rstrip().splitlines()[-1]
    assert re.fullmatch(LAST_LINES[example], last)
