"""What this study is made of."""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import load_file

from studies.denoising import noise
from studies.denoising.conversion import UNCONVERTED, WEIGHT_DTYPES, convert
from studies.denoising.evaluation import SI_SDR, evaluate, gains_of, mean_stoi_percent, stoi, unchanged
from studies.denoising.model import Denoiser, load_original, original_file
from studies.denoising.noise import Pair, held_out_pairs
from studies.denoising.onnx_original import OnnxOriginal
from studies.denoising.plots import plot_quality
from studies.denoising.rows import BLOCKS_ROWS, DENSE, NOISY, PICKS_ROWS, ROWS, TASK, UNTRAINED, Row
from studies.denoising.speech import GROUPS, Speech
from studies.denoising.table import tables
from studies.denoising.timing import time_all
from studies.denoising.training import Settings, fine_tune
from studies.runs.records import Key, Records
from studies.runs.spread import thinned
from studies.runs.study import OnStep, Place, Study, keep_weights, weights_path

LOSSES = 20  # means of the training loss that are kept
SPEECH_FILE = "speech.safetensors"


@dataclasses.dataclass(frozen=True)
class Recordings:
    """Speech to train on, held-out mixtures by group, and what all rows have in common."""

    speech: Speech
    pairs: Mapping[str, Sequence[Pair]]
    fine_tuning: Settings
    name: ClassVar[str] = TASK

    @property
    def steps(self) -> int:
        return self.fine_tuning.steps


def load(name: str, place: Place) -> Recordings:
    """Decode the speech into the folder of the models, once."""
    original_file()
    stoi()
    speech = Speech.load(place.models / SPEECH_FILE)
    return Recordings(speech, held_out_pairs(speech), Settings())


def settings(task: Recordings, row: Row, steps: int) -> dict[str, Any]:
    data = {
        "speech_sha256": task.speech.sha256(),
        "model_sha256": hashlib.sha256(original_file().read_bytes()).hexdigest(),
        "held_out_seed": noise.HELD_OUT_SEED,
        "held_out_snr_db": list(noise.HELD_OUT_SNR_DB),
        "noise": list(noise.KINDS),
    }
    tuned = {} if row in UNTRAINED else dataclasses.asdict(task.fine_tuning) | {"steps": steps} | row.settings()
    return data | tuned


def train(task: Recordings, row: Row, key: Key, place: Place, on_step: OnStep) -> dict[str, Any]:
    """Fine-tune, keep the weights, and evaluate the model in torch and converted.

    Args:
        place: with the models of the runs before, of which some rows need the dense one.
    """
    if row in UNTRAINED:
        return {"quality": {UNCONVERTED: evaluate(unchanged if row is NOISY else OnnxOriginal(), task.pairs)}}
    dense = weights_path(place.models, key._replace(row=DENSE.name))
    model = _load_trained(dense) if row.begins_dense else load_original()
    teacher = _load_trained(dense) if row.taught else None
    tuning = dataclasses.replace(task.fine_tuning, steps=key.steps)
    losses = fine_tune(model, row, task.speech, key.seed, tuning, on_step, teacher)
    keep_weights(model, place.models, key)
    quality = {UNCONVERTED: evaluate(gains_of(model), task.pairs)}
    for name, weight_dtype in WEIGHT_DTYPES.items():
        converted = convert(model, linear_too=row.linear_too, weight_dtype=weight_dtype)
        quality[name] = evaluate(gains_of(converted), task.pairs)
    return {"quality": quality, "training_loss": thinned(losses, LOSSES)}


def _load_trained(path: Path) -> Denoiser:
    """Return the model that a run has kept, in eval mode."""
    model = load_original()
    model.load_state_dict(load_file(path))
    return model


def outcome(task: Recordings, run: dict[str, Any]) -> str:
    quality = run["quality"][UNCONVERTED]
    by_group = ", ".join(f"{group} {statistics.fmean(quality[SI_SDR][group]):.2f} dB" for group in GROUPS)
    return f"SI-SDR {by_group}, STOI {mean_stoi_percent(quality):.1f} %"


DENOISING = Study(
    name="denoising",
    title="A trained denoiser pruned, fine-tuned and streamed.",
    records=Records(
        "studies.denoising",
        frozenset({"settings", "quality", "processor", "versions"}),
        times=frozenset({"streamed_us", "whole_us"}),
    ),
    selections={"all": ROWS, "picks": PICKS_ROWS, "blocks": BLOCKS_ROWS},
    always=(*UNTRAINED, DENSE),
    untrained=[row.name for row in UNTRAINED],
    settings=settings,
    train=train,
    outcome=outcome,
    tables=tables,
    plot=plot_quality,
    time=time_all,
    keeps_models=True,
    tasks=(TASK,),
    load=load,
)
