"""Fine-tune what is missing in a file, evaluate it as it will be used, and keep its weights."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import load_file, save

from studies.denoising import noise
from studies.denoising.conversion import UNCONVERTED, WEIGHT_DTYPES, convert
from studies.denoising.evaluation import Quality, evaluate, gains_of, mean_db, unchanged
from studies.denoising.model import Denoiser, load_original, original_file
from studies.denoising.noise import Pair, held_out_pairs
from studies.denoising.onnx_original import OnnxOriginal
from studies.denoising.rows import NOISY, ORIGINAL, Row
from studies.denoising.speech import GROUPS, Speech
from studies.denoising.training import Settings, fine_tune
from studies.runs.progress import one_thread, run_bars
from studies.runs.records import Key, Records, key_of
from studies.runs.spread import thinned
from triton_sparse_rnn.atomic_files import write_atomically
from triton_sparse_rnn.doctor import processor_name, versions

TASK = "denoising"
RECORDS = Records("studies.denoising", frozenset({"settings", "processor", "versions"}))
LOSSES = 20  # means of the training loss that are kept
SPEECH_FILE = "speech.safetensors"


def run_missing(
    rows: Sequence[Row], folder: Path, path: Path, settings: Settings, *, console: Console | None = None
) -> None:
    """Run all rows with their seeds, but for those that the file holds, one thread each.

    Args:
        folder: gets the decoded speech and the weights of every run.
        path: gets a line for each finished run.
    Raises:
        MissingDataError: speech, the trained model or a package is missing.
        ValueError: the file is not ours, or holds a run of the same name with other settings.
        KeyboardInterrupt: Ctrl-C; the file holds all finished runs.
    """
    console = Console() if console is None else console
    original_file()
    done = {key_of(run): run for run in RECORDS.read(path)}
    if not (folder / SPEECH_FILE).exists():
        console.print(f"Decoding speech into {folder / SPEECH_FILE}, once", highlight=False, soft_wrap=True)
    speech = Speech.load(folder / SPEECH_FILE)
    pairs, common = held_out_pairs(speech), common_settings(speech)
    plan = {Key(TASK, row.name, seed, settings.steps): row for row in rows for seed in range(row.seeds)}
    deciding = {key: common | dataclasses.asdict(settings) | row.settings() for key, row in plan.items()}
    missing = RECORDS.missing(path, deciding)
    with one_thread(), run_bars(console, TASK, len(plan), len(plan) - len(missing)) as begin:
        for name, gains in ((NOISY, unchanged), (ORIGINAL, OnnxOriginal())):
            if Key(TASK, name, 0, 0) not in done:
                quality = {UNCONVERTED: evaluate(gains, pairs)}
                RECORDS.append(path, record(TASK, name, 0, 0, common, quality=quality))
                console.print(f"{name}: {_outcome(quality[UNCONVERTED])}", highlight=False, soft_wrap=True)
        for key in missing:
            row, seed = plan[key], key.seed
            bars = begin(f"{key.row}, seed {seed}", settings.steps)
            began = time.perf_counter()
            model = load_original()
            losses = fine_tune(model, row, speech, seed, settings, bars.on_step)
            seconds = time.perf_counter() - began
            path_of_weights = weights_file(folder, row.name, seed, settings.steps)
            write_atomically(path_of_weights, [save(model.state_dict())])
            quality = evaluate_conversions(model, row, pairs)
            facts = {"quality": quality, "training_loss": thinned(losses, LOSSES), "seconds": seconds}
            RECORDS.append(path, record(TASK, row.name, seed, settings.steps, deciding[key], **facts))
            bars.finish(f"{_outcome(quality[UNCONVERTED])}, {seconds:.0f} s")


def common_settings(speech: Speech) -> dict[str, Any]:
    """What decides every outcome, for JSON: the data."""
    return {
        "speech_sha256": speech.sha256(),
        "model_sha256": hashlib.sha256(original_file().read_bytes()).hexdigest(),
        "held_out_seed": noise.HELD_OUT_SEED,
        "held_out_snr_db": list(noise.HELD_OUT_SNR_DB),
        "noise": list(noise.KINDS),
    }


def evaluate_conversions(model: Denoiser, row: Row, pairs: Mapping[str, Sequence[Pair]]) -> dict[str, Quality]:
    """Return the quality of a fine-tuned model in torch, converted, and converted to weights of 8 bits."""
    quality = {UNCONVERTED: evaluate(gains_of(model), pairs)}
    for name, weight_dtype in WEIGHT_DTYPES.items():
        converted = convert(model, linear_too=row.linear_too, weight_dtype=weight_dtype)
        quality[name] = evaluate(gains_of(converted), pairs)
    return quality


def weights_file(folder: Path, row: str, seed: int, steps: int) -> Path:
    """Where the weights of a run are."""
    return folder / f"{row.replace(' ', '-').replace('%', 'percent')}-seed-{seed}-steps-{steps}.safetensors"


def load_weights(path: Path) -> Denoiser:
    """Return the model that a run left, in eval mode."""
    model = Denoiser()
    model.load_state_dict(load_file(path))
    return model.eval()


def record(task: str, row: str, seed: int, steps: int, settings: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """Return a line for the file."""
    name = {"task": task, "row": row, "seed": seed, "steps": steps, "settings": settings}
    return name | facts | {"processor": processor_name(), "versions": versions()}


def _outcome(quality: Quality) -> str:
    return "SI-SDR " + ", ".join(f"{group} {mean_db(quality[group]):.2f} dB" for group in GROUPS)
