"""The numbers of a finished run: measured only after the converted model has been checked."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import Tensor, nn

from triton_sparse_rnn.atomic_files import write_atomically
from triton_sparse_rnn.conversion import to_sparse
from triton_sparse_rnn.demo.checkpoint import Progress
from triton_sparse_rnn.demo.evaluation import Comparison, WrongResultError, bits_per_character, check_same_outputs
from triton_sparse_rnn.demo.generation import draw_noise, time_streams
from triton_sparse_rnn.demo.model import CharacterModel, build_model
from triton_sparse_rnn.demo.narrow import NARROW, convert_narrow
from triton_sparse_rnn.demo.settings import PATTERNS, Settings
from triton_sparse_rnn.demo.text import Text
from triton_sparse_rnn.demo.training import Training
from triton_sparse_rnn.doctor import describe_processor, versions
from triton_sparse_rnn.nn.training import SparseGRU
from triton_sparse_rnn.saving import load_sparse, save_sparse
from triton_sparse_rnn.sparse.patterns import PatternLike

SPARSE_FILE, BLOCKS_FILE, DENSE_FILE = "model.safetensors", "model-blocks.safetensors", "dense.safetensors"
CHECKED = (256, 8)  # T, B of the comparison between trained and converted model
NARROW_CHECKED = 64  # T of that with narrow weights, which takes plain torch for comparison


def convert_and_check(
    trained: CharacterModel, text: Text, storage: PatternLike | None = None
) -> tuple[CharacterModel, Comparison]:
    """Return the model with its layer converted, and how far its outputs are from the trained one's.

    `storage` is that of `to_sparse`.

    Raises:
        WrongResultError: farther than rounding explains.
    """
    converted = cast(CharacterModel, to_sparse(trained.eval(), storage=storage))
    return converted, check_same_outputs(trained, converted, _check_ids(text))


def _check_ids(text: Text) -> Tensor:
    T, B = CHECKED
    B = max(1, min(B, len(text.held_out) // T))
    return text.held_out[: B * T].view(B, -1).t().long()


def measure(
    trained: Mapping[str, CharacterModel],
    converted: CharacterModel,
    text: Text,
    settings: Settings,
    folder: Path,
) -> dict[str, dict[str, Any]]:
    """Save all models to `folder` and measure them; see `display.result_table` for the columns.

    Times are of one symbol, times how many of them a character of the held-out text takes.

    The rows named in NARROW are the model of picks with the weights of its layer stored in fewer bytes. The row
    "dense_weights_in_our_kernel" is the dense model converted: it has no zeros to skip, so its speed tells what of a
    ratio is not due to sparsity.

    Args:
        trained: the models by kind.
        converted: that of picks.
        text, settings: of the run.
        folder: for the files.
    """
    dense = trained["dense"]
    narrow = convert_narrow(trained["picks"], _check_ids(text)[:NARROW_CHECKED])
    blocks, _ = convert_and_check(trained["blocks"], text, storage=PATTERNS["blocks"])
    for file, model in (
        (SPARSE_FILE, converted),
        (BLOCKS_FILE, blocks),
        *((NARROW[name].file, model) for name, model in narrow.items()),
    ):
        save_sparse(model, folder / file)
        check_saved(model, folder / file, text, settings)
    dense_tensors = {name: tensor.contiguous() for name, tensor in dense.state_dict().items()}
    write_atomically(folder / DENSE_FILE, [save(dense_tensors)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a dense weight is converted: said in the name of the row
        unpruned, _ = convert_and_check(dense, text, storage=(16, 32))  # or torch would multiply by weight_ih
    models = {
        "dense": dense,
        "picks": converted,
        **narrow,
        "blocks": blocks,
        "dense_weights_in_our_kernel": unpruned,
    }
    rows = _time_rows(models, text, settings)
    zeros = f"{100 * settings.sparsity:g} % zeros"
    described = {
        "dense": ("nn.GRU", DENSE_FILE),
        "picks": (f"{zeros} in picks", SPARSE_FILE),
        **{name: (one.label, one.file) for name, one in NARROW.items()},
        "blocks": (f"{zeros} in blocks", BLOCKS_FILE),
    }
    for name, (label, file) in described.items():
        rows[name] |= {
            "name": label,
            "bits_per_character": bits_per_character(models[name], text, settings.held_out),
            "file": file,
            "file_bytes": (folder / file).stat().st_size,
        }
    for name, model in trained.items():
        rows[name] |= {
            "nonzero_parameters": count_nonzero(model),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
    return rows


def _time_rows(models: dict[str, CharacterModel], text: Text, settings: Settings) -> dict[str, dict[str, Any]]:
    noise = draw_noise(settings.generated, len(text.vocabulary), settings.seed)
    times = time_streams(models, text.held_out[:100].long(), noise)
    return {
        name: {
            "us_per_character": time.loop_us * text.bytes_per_character,
            "layer_us_per_character": time.layer_us * text.bytes_per_character,
        }
        for name, time in times.items()
    }


def check_saved(converted: CharacterModel, path: Path, text: Text, settings: Settings) -> None:
    """Load the file into a freshly built model and compare outputs, to the bit.

    Raises:
        WrongResultError: they differ.
    """
    fresh = build_model(SparseGRU, len(text.vocabulary), settings.input_size, settings.hidden_size, settings.seed + 1)
    loaded = load_sparse(fresh, path)
    ids = _check_ids(text)
    with torch.inference_mode():
        if not torch.equal(loaded(ids)[0], converted(ids)[0]):
            raise WrongResultError(f"the model loaded from {path} does not give the outputs of the one that was saved")


def count_nonzero(model: nn.Module) -> int:
    """Return how many parameters of a model are not zero."""
    return sum(int(parameter.count_nonzero()) for parameter in model.parameters())


def describe_run(
    settings: Settings,
    text: Text,
    check: Comparison,
    models: dict[str, dict[str, Any]],
    trainings: Sequence[Training],
    progress: Progress,
) -> dict[str, Any]:
    """Return what results.json holds; bits are per character, times in the unit of their name."""
    return {
        "models": models,
        "check": dataclasses.asdict(check),
        "settings": dataclasses.asdict(settings),
        "text": {"source": text.source, "sha256": text.sha256, "held_out_bytes": len(text.held_out)},
        "training": {
            training.kind: {
                "seconds": round(progress.seconds[training.kind], 1),
                "forecast_sparsity": training.forecast.sparsity if training.forecast else 0.0,
                "final_sparsity": training.sparsities[-1],
                "bits_per_character": [round(bits * text.bytes_per_character, 4) for bits in training.losses],
                "sparsity": [round(sparsity, 4) for sparsity in training.sparsities],
            }
            for training in trainings
        },
        "versions": versions(),
        "machine": describe_processor(),
    }
