"""The demo from text to table."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from triton_sparse_rnn.atomic_files import write_atomically
from triton_sparse_rnn.demo.checkpoint import CHECKPOINT, Progress, damaged, load_checkpoint, save_checkpoint
from triton_sparse_rnn.demo.display import closing_lines, result_table, sample_writer, training_bar
from triton_sparse_rnn.demo.generation import draw_noise, generate
from triton_sparse_rnn.demo.model import CharacterModel
from triton_sparse_rnn.demo.narrow import NARROW
from triton_sparse_rnn.demo.plots import plot_mask, plot_training
from triton_sparse_rnn.demo.results import (
    BLOCKS_FILE,
    DENSE_FILE,
    SPARSE_FILE,
    convert_and_check,
    describe_run,
    measure,
)
from triton_sparse_rnn.demo.settings import PATTERNS, Settings
from triton_sparse_rnn.demo.text import Text, load_text
from triton_sparse_rnn.demo.training import Training, train

MODEL_FILES = (DENSE_FILE, SPARSE_FILE, BLOCKS_FILE, *(narrow.file for narrow in NARROW.values()))
WRITTEN = (*MODEL_FILES, "results.json", "loss_and_sparsity.png", "mask.png", "mask-blocks.png", "sample.txt")
SHOWN = 600  # symbols of the sample on the screen
TEMPERATURE = 0.7  # of the sample
PROMPT = 400  # symbols of held-out text that the sample continues, back to the end of a line


def run_demo(
    settings: Settings,
    *,
    folder: Path,
    text_path: Path | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train a model pruned in picks, a dense one and one pruned in blocks; convert, check, generate, measure.

    All is written to `folder`.

    Args:
        settings: the numbers of the run.
        folder: made if it is not there.
        text_path: a file or a folder of text, None for the sources of Python's standard library.
        resume: go on from the checkpoint in `folder`.
        console: where to show it, None for the terminal.
    Returns:
        What results.json holds.
    Raises:
        TextError: the text cannot be used.
        CheckpointError: `resume`, and there is no checkpoint of this very run, or a damaged one.
        OSError: `folder` cannot be written to; a checkpoint in it is whole.
        WrongResultError: the converted model differs from the trained one; no number is written.
        KeyboardInterrupt: Ctrl-C; once training has begun, `folder` holds a checkpoint.
    """
    console = Console() if console is None else console
    folder.mkdir(parents=True, exist_ok=True)
    with _threads(settings.threads):
        text = load_text(text_path, min_bytes=settings.min_bytes, seed=settings.seed)
        progress = load_checkpoint(folder / CHECKPOINT, settings, text) if resume else Progress()
        if not resume and (folder / CHECKPOINT).exists():
            console.print(f"The unfinished run in {folder} is not continued: --resume was not given", highlight=False)
        console.print(f"Text: {text.source}; its last {len(text.held_out):,} bytes are held out", highlight=False)
        trainings = {kind: _train(kind, settings, text, progress, folder, console) for kind in PATTERNS}
        trained = {kind: training.model for kind, training in trainings.items()}
        converted, check = convert_and_check(trained["picks"], text)
        console.print(f"Converted with to_sparse(): {check}", highlight=False)
        sample = _write_sample(converted, text, settings, console)
        models = measure(trained, converted, text, settings, folder)
    results = describe_run(settings, text, check, models, [*trainings.values()], progress)
    _draw(trainings, results, text, folder)
    write_atomically(folder / "sample.txt", [sample.encode()])
    write_atomically(folder / "results.json", [f"{json.dumps(results, indent=1)}\n".encode()])
    (folder / CHECKPOINT).unlink()
    console.print(result_table(results["models"]))
    for line in closing_lines(results):
        console.print(line, highlight=False)
    console.print(f"Written to {folder}/: {', '.join(WRITTEN)}", highlight=False)
    return results


def _train(kind: str, settings: Settings, text: Text, progress: Progress, folder: Path, console: Console) -> Training:
    """Bring one training to its end, from where `progress` left it, with checkpoints on the way."""
    training = Training(kind, settings, text)
    if training.forecast is not None:
        console.print(
            f"Forecast: {training.forecast.sparsity:.1%} zeros in the recurrent layer, "
            f"{training.forecast.nbytes:,} of {training.forecast.dense_nbytes:,} bytes",
            highlight=False,
        )
    state = progress.states.get(kind)
    if state is not None:
        try:
            training.load_state_dict(state)
        except Exception as error:  # what torch raises on a state that is not its own has no common type
            raise damaged(folder / CHECKPOINT, error) from error
    began = time.perf_counter() - progress.seconds.get(kind, 0.0)

    def save() -> None:
        progress.states[kind] = training.state_dict()
        progress.seconds[kind] = time.perf_counter() - began
        save_checkpoint(folder / CHECKPOINT, progress, settings, text)

    with training_bar(console, training, text.bytes_per_character) as show:
        train(training, save=save, on_step=show)
    if training.forecast is not None:
        console.print(f"Became {training.sparsities[-1]:.1%} zeros", highlight=False)
    return training


def _write_sample(model: CharacterModel, text: Text, settings: Settings, console: Console) -> str:
    """Generate text symbol by symbol, show the beginning as it comes, and return all of it."""
    vocabulary = text.vocabulary
    noise = draw_noise(settings.generated, len(vocabulary), settings.seed)
    prompt = text.held_out[:PROMPT].long()
    line_ends = (prompt == vocabulary.encode(b"\n")).nonzero().flatten().tolist()
    prompt = prompt[: line_ends[-1] + 1] if line_ends else prompt
    decoder, pieces = vocabulary.decoder(), []
    with sample_writer(console, "text from the converted model, one step() per character") as write:

        def show(symbol: int) -> None:
            pieces.append(decoder(symbol))
            if len(pieces) <= SHOWN:
                write(pieces[-1])

        generate(model, prompt, noise, temperature=TEMPERATURE, on_symbol=show)
    return "".join(pieces) + "\n"


def _draw(trainings: dict[str, Training], results: dict[str, Any], text: Text, folder: Path) -> None:
    rows, picks = results["models"], trainings["picks"]
    settings, per_character = picks.settings, text.bytes_per_character
    sizes = f"GRU {settings.hidden_size}, {settings.steps:,} steps on {text.name}"
    plot_training(
        folder / "loss_and_sparsity.png",
        {kind: [bits * per_character for bits in one.losses] for kind, one in trainings.items()},
        picks.sparsities,
        {kind: rows[kind]["bits_per_character"] for kind in trainings},
        f"{sizes}: pruned to {100 * picks.sparsities[-1]:.0f} % while it trains",
    )
    for kind, file in (("picks", "mask.png"), ("blocks", "mask-blocks.png")):
        pattern = trainings[kind].pattern
        assert pattern is not None
        plot_mask(
            folder / file,
            trainings[kind].model.rnn.weight_hh_l0,
            ("r (reset)", "z (update)", "n (new)"),
            pattern,
            f"What is kept of the recurrent weight, pruned in {kind}: {sizes}",
        )


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
