import copy
import io
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from triton_sparse_rnn.demo import results as demo_results
from triton_sparse_rnn.demo.checkpoint import CHECKPOINT, CheckpointError, Progress, save_checkpoint
from triton_sparse_rnn.demo.evaluation import WrongResultError
from triton_sparse_rnn.demo.model import CharacterModel, build_model
from triton_sparse_rnn.demo.narrow import NARROW
from triton_sparse_rnn.demo.run import MODEL_FILES, WRITTEN, run_demo
from triton_sparse_rnn.demo.settings import PATTERNS, Settings
from triton_sparse_rnn.demo.text import Text
from triton_sparse_rnn.demo.training import Training
from triton_sparse_rnn.nn.training import SparseGRU
from triton_sparse_rnn.saving import load_sparse


def run(settings: Settings, text_file: Path, folder: Path, *, resume: bool = False) -> tuple[dict[str, Any], str]:
    console = Console(file=io.StringIO(), width=100)
    results = run_demo(settings, folder=folder, text_path=text_file, resume=resume, console=console)
    return results, console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def finished(tiny: Settings, text_file: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("whole") / "demo-output"
    return (folder, *run(tiny, text_file, folder))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{file}/{name}": tensor for file in MODEL_FILES for name, tensor in load_file(folder / file).items()}


def test_everything_is_written_and_the_checkpoint_gone(finished):
    folder, results, _ = finished
    assert sorted(file.name for file in folder.iterdir()) == sorted(WRITTEN)
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    assert len((folder / "sample.txt").read_text(encoding="utf-8")) > 20


def test_results_hold_what_the_table_shows(finished, tiny: Settings):
    folder, results, output = finished
    for kind in ("dense", "picks", *NARROW, "blocks"):
        row = results["models"][kind]
        assert row["file_bytes"] == (folder / row["file"]).stat().st_size
        *_, line = (line for line in output.splitlines() if line.strip().startswith(f"{row['name']} "))
        for shown in (f"{row['bits_per_character']:.3f}", f"{row['file_bytes']:,}", f"{row['us_per_character']:.1f}"):
            assert shown in line
        assert row["us_per_character"] > row["layer_us_per_character"] > 0
    for kind in PATTERNS:
        assert f"{results['models'][kind]['nonzero_parameters']:,}" in output
        assert len(results["training"][kind]["bits_per_character"]) == tiny.steps
    dense, picks, blocks = (results["models"][kind] for kind in ("dense", "picks", "blocks"))
    for sparse in (picks, blocks):
        assert sparse["nonzero_parameters"] < dense["nonzero_parameters"] == dense["parameters"] == sparse["parameters"]
    assert results["check"]["difference"] <= results["check"]["allowed"]
    assert results["settings"]["hidden_size"] == tiny.hidden_size
    for kind in ("picks", "blocks"):
        assert results["training"][kind]["final_sparsity"] == pytest.approx(0.9, abs=0.05)
    assert "forecast" in output.lower()


@pytest.mark.parametrize("kind", ["picks", *NARROW, "blocks"])
def test_the_saved_model_is_the_one_that_was_measured(finished, tiny: Settings, text, kind: str):
    folder, results, _ = finished
    row = results["models"][kind]
    model = build_model(SparseGRU, len(text.vocabulary), tiny.input_size, tiny.hidden_size, seed=9)
    loaded = load_sparse(model, folder / row["file"]).eval()
    assert demo_results.bits_per_character(loaded, text, tiny.held_out) == row["bits_per_character"]


@pytest.mark.slow("programs")
@pytest.mark.parametrize(("kind", "step"), [("picks", 7), ("picks", 14), ("dense", 1), ("blocks", 8), ("blocks", 14)])
def test_interrupted_and_resumed_is_the_same_to_the_bit(
    finished, tiny: Settings, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, step: int
):
    take_step, taken = Training.step, []

    def interrupted_step(self: Training) -> None:
        take_step(self)
        taken.append((self.kind, self.step_count))
        if taken[-1] == (kind, step):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Training, "step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, text_file, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
    results, _ = run(tiny, text_file, tmp_path, resume=True)
    assert taken == [(one, count) for one in PATTERNS for count in range(1, tiny.steps + 1)]  # none twice
    folder, whole, _ = finished
    theirs = weights_of(folder)
    for name, tensor in weights_of(tmp_path).items():
        assert torch.equal(tensor, theirs[name]), name
    for model in (*PATTERNS, *NARROW):
        for number in ("bits_per_character", "file_bytes"):
            assert results["models"][model][number] == whole["models"][model][number]
    for model in PATTERNS:
        for history in ("bits_per_character", "sparsity"):
            assert results["training"][model][history] == whole["training"][model][history]
    assert (tmp_path / "sample.txt").read_text() == (folder / "sample.txt").read_text()


def test_no_number_is_shown_for_a_wrong_conversion(
    tiny: Settings, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    convert = demo_results.to_sparse

    def convert_wrongly(model: CharacterModel, **options: Any) -> Any:
        converted: Any = convert(model, **options)
        converted.rnn.bias_hh_l0 += 0.01
        return converted

    monkeypatch.setattr(demo_results, "to_sparse", convert_wrongly)
    with pytest.raises(WrongResultError, match="not the trained one"):
        run(tiny, text_file, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


DELETED = object()


def change_entry(state: Any, path: str, value: Any) -> None:
    """Set an entry of nested dicts and lists, or take it out."""
    *keys, last = (int(key) if key.isdecimal() else key for key in path.split("/"))
    for key in keys:
        state = state[key]
    if value is DELETED:
        del state[last]
    else:
        state[last] = value


FOREIGN = [None, 5, "text", [], {}, torch.ones(2, 3), torch.ones(2).to_sparse(), DELETED]
ENTRIES = (
    *("kind", "model", "model/rnn.weight_hh_l0", "optimizer", "optimizer/state", "optimizer/state/0"),
    *("optimizer/state/0/exp_avg", "optimizer/param_groups", "optimizer/param_groups/0"),
    *("optimizer/param_groups/0/betas", "pruner", "pruner/settings", "losses", "losses/0", "sparsities"),
    *("h", "random"),
)


@pytest.fixture(scope="module")
def interrupted(tiny: Settings, text: Text) -> dict[str, Any]:
    """What a training holds after three steps."""
    training = Training("picks", tiny, text)
    for _ in range(3):
        training.step()
    return training.state_dict()


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_checkpoint_with_foreign_entries_of_a_training(
    tiny: Settings, text: Text, text_file: Path, tmp_path: Path, interrupted: dict[str, Any], entry: str
):
    for value in FOREIGN[1:] if entry == "h" else FOREIGN:  # None is the state of a stream that begins
        state = copy.deepcopy(interrupted)
        change_entry(state, entry, value)
        save_checkpoint(tmp_path / CHECKPOINT, Progress({"picks": state}, {"picks": 1.0}), tiny, text)
        with pytest.raises(
            CheckpointError, match=r"checkpoint.pt: damaged, or not a checkpoint of this demo"
        ) as caught:
            run(tiny, text_file, tmp_path, resume=True)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("kind", "dense", "it is of a 'dense' training, not of a 'picks' one"),
        ("h", torch.zeros(1, 3, 21), "h must be a state of the layer"),
        ("h", torch.zeros(1, 3, 20).double(), "h must be a state"),
        ("losses", [1.0] * 15, "losses must be numbers, one for each step"),
        ("losses", [1.0] * 2, "sparsities must be numbers, one for each step"),
        ("pruner/step_count", 2, "the pruner is at step 2, losses are of 3 steps"),
        ("optimizer/state", {}, "the optimizer's options or state"),
        ("optimizer/param_groups/0/weight_decay", 0.5, "the optimizer's options or state"),
        ("optimizer/state/1/exp_avg", torch.zeros(60, 6), "the optimizer's state does not fit the weights"),
        ("optimizer/state/1/step", torch.zeros(2), "the optimizer's state does not fit"),
    ],
)
def test_a_training_refuses_what_would_fail_later(
    tiny: Settings, text: Text, interrupted: dict[str, Any], entry: str, value: Any, message: str
):
    state = copy.deepcopy(interrupted)
    change_entry(state, entry, value)
    with pytest.raises(ValueError, match=message):
        Training("picks", tiny, text).load_state_dict(state)
    Training("picks", tiny, text).load_state_dict(interrupted)
