"""What a demo run shows in a terminal: progress bars, the generated text, the final table."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text as RichText

from triton_sparse_rnn.demo.narrow import NARROW
from triton_sparse_rnn.demo.training import Training

NAMES = {"picks": "in picks", "dense": "nn.GRU", "blocks": "in blocks"}


@contextlib.contextmanager
def training_bar(console: Console, training: Training, bytes_per_character: float) -> Iterator[Callable[[], None]]:
    """Show one training as a bar with loss, sparsity and time left; yields what to call after each step."""
    columns = [
        TextColumn("{task.description:<9}"),
        BarColumn(bar_width=None, complete_style="dark_orange3", finished_style="dark_orange3"),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    ]
    name, steps = NAMES[training.kind], training.settings.steps
    with Progress(*columns, console=console, expand=True) as progress:
        task = progress.add_task(name, total=steps, completed=training.step_count, state="")

        def show() -> None:
            recent = training.losses[-50:]
            state = f"{sum(recent) / len(recent) * bytes_per_character:.3f} bits/char"
            if training.pruner is not None:
                state += f"  {100 * training.sparsities[-1]:4.1f} % pruned"
            progress.update(task, completed=training.step_count, state=state)
            if not console.is_terminal and training.step_count % max(1, steps // 10) == 0:
                console.print(f"{name}, step {training.step_count:,} of {steps:,}: {state}", highlight=False)

        if training.losses:
            show()
        yield show


@contextlib.contextmanager
def sample_writer(console: Console, title: str) -> Iterator[Callable[[str], None]]:
    """Show generated text as it comes, between two rules; yields what to call with each piece."""
    console.print(Rule(title, style="dim"))
    yield lambda piece: console.print(RichText(piece), end="", soft_wrap=True)
    console.print()
    console.print(Rule(style="dim"))


def result_table(models: dict[str, dict[str, Any]]) -> Table:
    """Return the table of `results["models"]`: speed and accuracy of a model in one row.

    The model of picks is followed by what it is with its weights stored in fewer bytes, and by that of blocks.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("model", no_wrap=True)
    for heading in ("bits/char", "non-zero\nparameters", "file,\nbytes", "µs/char", "layer\nalone"):
        table.add_column(heading, justify="right", no_wrap=True)
    for kind in ("dense", "picks", *NARROW, "blocks"):
        row = models[kind]
        table.add_row(
            f"  {row['name']}" if kind in NARROW else row["name"],
            f"{row['bits_per_character']:.3f}",
            f"{row['nonzero_parameters']:,}" if "nonzero_parameters" in row else "",
            f"{row['file_bytes']:,}",
            f"{row['us_per_character']:.1f}",
            f"{row['layer_us_per_character']:.1f}",
            style="bold" if kind == "picks" else "",
        )
    return table


def closing_lines(results: dict[str, Any]) -> list[str]:
    """Say in words what the table means, and what it does not."""
    models = results["models"]
    kinds = ("dense", "picks", "blocks", "dense_weights_in_our_kernel")
    dense, picks, blocks, kernel = (models[kind] for kind in kinds)
    int8 = models["int8_weights"]
    smaller = dense["file_bytes"] / int8["file_bytes"]
    changes = [row["bits_per_character"] - picks["bits_per_character"] for row in (int8, models["int8"])]
    speed = dense["us_per_character"] / picks["us_per_character"]
    size = dense["file_bytes"] / picks["file_bytes"]
    worse, of_blocks = (row["bits_per_character"] - dense["bits_per_character"] for row in (picks, blocks))
    layer = dense["layer_us_per_character"] / picks["layer_us_per_character"]
    slow_path = dense["layer_us_per_character"] / kernel["layer_us_per_character"]
    of_layer = blocks["layer_us_per_character"] / picks["layer_us_per_character"]
    rest = picks["us_per_character"] - picks["layer_us_per_character"]
    return [
        f"The model pruned in picks (single weights) writes at {speed:.1f}x the speed of nn.GRU, from a file "
        f"{size:.1f}x smaller, at {worse:+.3f} bits per character; in blocks of 16 x 1 as many zeros cost "
        f"{of_blocks:+.3f}, and the layer takes {of_layer:.2f} times as long.",
        f"Its layer alone runs at {layer:.1f}x the speed. Of that, {slow_path:.1f}x is nn.GRU's slow path at batch 1 "
        f"(what our kernel gains with the dense weights) and {layer / slow_path:.1f}x the zeros. "
        f"Embedding, decoder and sampling take {rest:.0f} µs.",
        f"With the layer's weights in int8 (embedding and decoder stay in float32) the file is {smaller:.1f}x smaller "
        f"than that of nn.GRU, at {changes[0]:+.4f} bits per character to the first; with activations in int8 "
        f"too at {changes[1]:+.4f}.",
        f"Measured on this machine ({results['machine']['processor']}): one thread, batch 1, one run, one seed.",
    ]
